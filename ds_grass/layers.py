"""From a model to what GRASS draws: its blocks, and everything else, which is outer.

A block is one entry of a repeated list. Lists are found by structure, never by the name of a class:

- A container is a module with numbered children (`0, 1`; in torch's own containers also `layer_0, layer_1`).
- Entries are alike when they share a class, a parameter of one name and shape, or half of their names. A
  container is a repeated list when half of its entries or more are like another one. Its blocks run from the
  first of these to the last: a hybrid's odd layers stay in, embedding and head at the ends stay out.
- The outermost list wins, so experts or sub-layers inside a block never do. The exception are stages (Swin,
  ResNet, UNet, lists of lists): if the entries differ in shape or are lists, and lists directly inside them
  hold most of their parameters, the entries of those inner lists are the blocks.
- Entries that are one weight each (tables, heads, an MLP's linears) count only if there is no other list.

Not covered: blocks that are attributes with unrelated names, pipeline stages, and lists of stages or models
of one width (each is then a block, unless `grass.layers` names the inner lists).
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import nn
from torch.nn import Parameter

_DOMINANT_OUTER = 0.4
_LIST_SHARE = 0.1
_TWIN_SHARE = 0.25  # even the first block of a ResNet stage shares this much with the second
_TORCH_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# torch.compile and checkpoint wrappers appear anywhere in a path, those of engines and PEFT in front
_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_PREFIXES = (["module"], ["base_model", "model"])

_Named = tuple[tuple[str, Parameter], ...]


@dataclass(frozen=True, eq=False)
class Block:
    """One drawable entry of a repeated list."""

    index: int
    """Place among the drawable blocks, in model order; entries that the user froze are not counted."""
    name: str
    """Path in the model as it stands, wrappers included, such as "model.layers.3"."""
    list_name: str
    module: nn.Module
    params: _Named
    """(name as in `model.named_parameters()`, trainable parameter), each once."""

    @property
    def numel(self) -> int:
        """Unsharded trainable elements."""
        return _count(self.params)


@dataclass(frozen=True, eq=False)
class Layout:
    """What is drawn, what always trains, what is held still; each trainable parameter is in exactly one."""

    blocks: tuple[Block, ...]
    outer: _Named
    """Outside the drawn blocks and trains always."""
    frozen_outer: _Named
    """Outside the drawn blocks, trainable as the user left it, held still by `grass.outer`."""
    lists: tuple[str, ...]
    """Paths of the lists whose entries are drawn."""
    other_lists: tuple[str, ...]
    """Repeated lists that take no part; their parameters are outer."""


def find_layout(
    model: nn.Module,
    *,
    layers: str | Sequence[str] | None = None,
    outer: str | Sequence[str] = "always",
    trainable: Container[int] | None = None,
) -> Layout:
    """Sort every trainable parameter of `model` into blocks and outer.

    layers: `grass.layers`. None takes the lists that hold a tenth of the trainable elements or more (where
        none does, a tenth of what the lists hold). A path is taken at its word: each entry there is a block.
    outer: `grass.outer`: "always", "never", or the paths of modules or parameters that train always.
    trainable: `id`s of the parameters that count, such as the optimizer's; None counts all.

    Only parameters that require a gradient now count. One that two blocks reach, or a block and something
    outside it, is outer. An entry without a trainable parameter of its own is no block.
    Raises ValueError that names `grass.layers` or `grass.outer` and lists what could have been meant.
    """
    known = _Model(model, trainable)
    found = _find_lists(model)
    entries = _lists_by_share(found, known) if layers is None else _lists_by_path(layers, found, known)
    owned = known.owned_by(entries)
    drawable = [(entry, params) for entry, params in zip(entries, owned, strict=True) if params]
    if not drawable:
        raise ValueError(
            f"grass.layers is {json.dumps(layers)} but its blocks' parameters are frozen, shared or not in "
            f"the optimizer; unfreeze some or name other lists; {_candidates(found, known)}"
        )
    blocks = [Block(i, e.name, e.list_name, e.module, params) for i, (e, params) in enumerate(drawable)]
    in_blocks = {id(param) for block in blocks for _, param in block.params}
    outside = tuple((name, param) for name, param in known.named if id(param) not in in_blocks)
    always = _always_trained(outer, outside, blocks, known)
    parts = {id(module) for block in blocks for module in block.module.modules()}
    others = [e for group in found if not group[0].is_weight for e in group if id(e.module) not in parts]
    lists = _list_names(blocks)
    return Layout(
        blocks=tuple(blocks),
        outer=tuple(pair for pair in outside if id(pair[1]) in always),
        frozen_outer=tuple(pair for pair in outside if id(pair[1]) not in always),
        lists=lists,
        other_lists=tuple(name for name in _list_names(others) if name not in lists),
    )


def num_elements(param: torch.Tensor) -> int:
    """Unsharded element count, also of a parameter that ZeRO-3 has partitioned (`numel()` is 0 there)."""
    count = getattr(param, "ds_numel", None)
    return param.numel() if count is None else int(count)


def outer_share(layout: Layout, active_layers: int) -> float:
    """Outer's share of what trains at once, which is outer and `active_layers` blocks of mean size."""
    outer = _count(layout.outer)
    mean_block = sum(block.numel for block in layout.blocks) / len(layout.blocks)
    return outer / (outer + min(active_layers, len(layout.blocks)) * mean_block)


def outer_warning(layout: Layout, active_layers: int, *, state_bytes: int = 12) -> str | None:
    """One line with the bytes when outer is more than 40 % of what trains at once, else None.

    state_bytes: optimizer state of one parameter; 12 = fp32 master weight and two fp32 moments.
    """
    share, count = outer_share(layout, active_layers), _count(layout.outer)
    if share <= _DOMINANT_OUTER:
        return None
    largest = max(layout.outer, key=lambda pair: num_elements(pair[1]))[0]
    return (
        f"{share:.0%} of what trains at once is outside the blocks: {count:,} parameters ({largest}), "
        f"{count * state_bytes / 1e9:.3g} GB of optimizer state at {state_bytes} bytes each, "
        f"{count * (state_bytes + 4) / 1e9:.3g} GB with fp32 gradients at {state_bytes + 4}; to save it set "
        'grass.outer to "never" or to the paths of the modules that must train'
    )


def _count(params: Iterable[tuple[str, Parameter]]) -> int:
    return sum(num_elements(param) for _, param in params)


@dataclass(frozen=True, eq=False)
class _Entry:
    """A numbered child of a container. Frozen parameters count: freezing must not change the structure."""

    list_name: str
    name: str
    module: nn.Module

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Unsharded shape by name within the entry."""
        named = self.module.named_parameters()
        return {name: tuple(getattr(param, "ds_shape", param.shape)) for name, param in named}

    @cached_property
    def is_weight(self) -> bool:
        """One linear, embedding, convolution or norm."""
        matrices = sum(len(shape) > 1 for shape in self.shapes.values())
        return matrices <= 1 and not any("." in name for name in self.shapes)

    @cached_property
    def numel(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())


def _find_lists(model: nn.Module) -> list[list[_Entry]]:
    """The top-most repeated lists in model order, each by its blocks; nothing inside a block is looked at."""
    found: list[list[_Entry]] = []
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        entries = _entries(path, module)
        run = _alike_run([entry for entry in entries if id(entry.module) not in seen])
        if len(entries) == 1 and isinstance(module, nn.ModuleList):
            seen.add(id(entries[0].module))  # a model of one block; its experts are no blocks either
        if run:
            found.append(_inner_blocks(run) or run)
            seen.update(id(entry.module) for entry in run)
        for name, child in module.named_children():
            visit(f"{path}.{name}".strip("."), child)

    visit("", model)
    return found


def _entries(path: str, module: nn.Module) -> list[_Entry]:
    """The numbered children of `module` that hold parameters, each once; [] when it is no container."""
    children = {name: child for name, child in module.named_children() if list(child.parameters())}
    numbered = {name: child for name, child in children.items() if name.isdecimal()}
    one_prefix = len({name.rstrip("0123456789") for name in children}) == 1
    # `layer_0, layer_1` as torchvision has it; in a module of one's own these may be two towers
    if not numbered and one_prefix and isinstance(module, _TORCH_CONTAINERS):
        numbered = {name: child for name, child in children.items() if name[-1:].isdecimal()}
    return [_Entry(path, f"{path}.{name}".strip("."), child) for name, child in numbered.items()]


def _alike_run(entries: list[_Entry]) -> list[_Entry]:
    """From the first to the last entry that is like another one; [] when fewer than half of these are."""
    entries = [entry for entry in entries if not entry.is_weight] or entries
    kinds: list[list[_Entry]] = []
    for entry in entries:
        same = [kind for kind in kinds if any(_alike(entry, member) for member in kind)]
        kinds = [kind for kind in kinds if kind not in same] + [[*sum(same, []), entry]]
    repeated = {entry for kind in kinds if len(kind) > 1 for entry in kind}
    places = [place for place, entry in enumerate(entries) if entry in repeated]
    run = entries[places[0] : places[-1] + 1] if places else []
    return run if 2 * len(repeated) >= len(run) else []


def _alike(one: _Entry, other: _Entry) -> bool:
    same_class = type(one.module) is type(other.module)
    if one.is_weight or other.is_weight:
        return same_class and one.is_weight == other.is_weight
    if same_class and type(one.module) not in _TORCH_CONTAINERS:  # a Sequential does not say what is in it
        return True
    common = one.shapes.keys() & other.shapes.keys()
    same_shape = any(one.shapes[name] == other.shapes[name] for name in common)
    return same_shape or 2 * len(common) >= min(len(one.shapes), len(other.shapes))


def _inner_blocks(stages: list[_Entry]) -> list[_Entry]:
    """The blocks of the lists directly inside `stages`, or [] when `stages` are blocks themselves.

    A block may hold lists too (experts, T5's sub-layers). Two things tell them apart: blocks have one width,
    stages differ; and the entries of a stage's lists have shapes in common, sub-layers have not.
    """
    inner: list[list[_Entry]] = []
    for stage in stages:
        places = {"": stage.module} if _entries("", stage.module) else dict(stage.module.named_children())
        inner += [_entries(f"{stage.name}.{name}".strip("."), child) for name, child in places.items()]
    repeated = [run for run in inner if len(run) > 1 and not any(entry.is_weight for entry in run)]
    repeated = [run for run in repeated if min(_twins(run)) >= _TWIN_SHARE]
    kinds = {type(entry.module) for run in repeated for entry in run}
    lists = [run for run in inner if run in repeated or (len(run) == 1 and type(run[0].module) in kinds)]
    blocks = [entry for run in lists for entry in run]
    total = sum(stage.numel for stage in stages)
    if len(lists) < 2 or 2 * sum(entry.numel for entry in blocks) < total:
        return []
    common = sum(share * stage.numel for share, stage in zip(_twins(stages), stages, strict=True))
    lists_of_lists = all(_entries("", stage.module) for stage in stages)
    return blocks if lists_of_lists or 2 * common < total else []


def _twins(entries: Sequence[_Entry]) -> list[float]:
    """Per entry, the share of its elements in parameters that another entry has too, by name and shape."""
    seen = Counter(pair for entry in entries for pair in entry.shapes.items())
    paired = [[shape for name, shape in e.shapes.items() if seen[name, shape] > 1] for e in entries]
    return [sum(map(prod, shapes)) / max(e.numel, 1) for e, shapes in zip(entries, paired, strict=True)]


def _list_names(entries: Sequence[_Entry | Block]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry.list_name for entry in entries))


class _Model:
    """The names in a model, its trainable parameters, and who reaches these."""

    def __init__(self, model: nn.Module, trainable: Container[int] | None) -> None:
        self.root = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        known = [(name, p) for name, p in model.named_parameters() if trainable is None or id(p) in trainable]
        self.named = tuple((name, p) for name, p in known if p.requires_grad and num_elements(p) > 0)
        self.names = {id(param): name for name, param in self.named}
        self.numel = _count(self.named)

    def owned_by(self, entries: Sequence[_Entry]) -> list[_Named]:
        """Per entry, the trainable parameters that it alone reaches."""
        # by identity, not by path: a second name for a whole block (an alias in a wrapper) is no second owner
        outside = self.root.named_modules(memo={entry.module for entry in entries})
        reached = Counter({id(param) for _, module in outside for param in module.parameters(recurse=False)})
        for entry in entries:
            reached.update({id(param) for param in entry.module.parameters()})
        own = {id_ for id_ in self.names if reached[id_] == 1}
        mine = [[param for param in entry.module.parameters() if id(param) in own] for entry in entries]
        return [tuple((self.names[id(param)], param) for param in params) for params in mine]

    def list_sizes(self, lists: Sequence[Sequence[_Entry]]) -> list[int]:
        """Trainable elements of each list, what is shared left out."""
        owned = iter(self.owned_by([entry for entries in lists for entry in entries]))
        return [sum(_count(next(owned)) for _ in entries) for entries in lists]


def _lists_by_share(found: list[list[_Entry]], known: _Model) -> list[_Entry]:
    lists = [entries for entries in found if not entries[0].is_weight] or found
    if not lists or (len(lists) > 1 and lists[0][0].is_weight):
        what = "only lists of single weights" if lists else "no repeated list (a reused block is one block)"
        raise ValueError(
            f"grass.layers is null but the model has {what}; GRASS chooses from at least two blocks, set "
            f'grass.layers to a path like "model.layers"; {_candidates(found, known)}'
        )
    sizes = known.list_sizes(lists)
    # a vocabulary can outweigh all blocks of a small model; then they are measured against each other
    whole = known.numel if max(sizes) >= _LIST_SHARE * known.numel else sum(sizes)
    large = [entries for entries, size in zip(lists, sizes, strict=True) if size >= _LIST_SHARE * whole]
    return [entry for entries in large for entry in entries]


def _lists_by_path(layers: str | Sequence[str], found: list[list[_Entry]], known: _Model) -> list[_Entry]:
    entries: list[_Entry] = []
    problem = ""
    for path in [layers] if isinstance(layers, str) else layers:
        matches = _resolve(path, known.modules)
        new = _entries(matches[0], known.modules[matches[0]]) if len(matches) == 1 else []
        entries += new
        if len(matches) != 1:
            problem = f"'{path}' may be {' or '.join(matches)}" if matches else f"the model has no '{path}'"
        elif not new:
            problem = f"'{path}' is a {type(known.modules[matches[0]]).__name__}, not a list of blocks"
    covered = Counter(id(module) for entry in entries for module in entry.module.modules())
    if twice := [entry.name for entry in entries if covered[id(entry.module)] > 1]:
        problem = f"it names '{twice[0]}' twice or inside another block"
    elif len(entries) < 2:
        problem = problem or f"it holds {len(entries)} block, too few to choose from"
    if problem:
        raise ValueError(
            f"grass.layers is {json.dumps(layers)} but {problem}; name a list, several that do not overlap, "
            f"or null; {_candidates(found, known)}"
        )
    order = {name: place for place, name in enumerate(known.modules)}
    return sorted(entries, key=lambda entry: order[entry.name])


def _resolve(path: str, objects: dict[str, object]) -> list[str]:
    """What `path` means in `objects`: itself, else what differs in wrappers only; one name per object."""
    names = [path] if path in objects else [name for name in objects if _bare(name) == _bare(path)]
    meant = {id(objects[name]) for name in names}
    first = {id(item): name for name, item in reversed(objects.items()) if id(item) in meant}
    return list(first.values())


def _bare(path: str) -> str:
    parts = [part for part in path.split(".") if part not in _TRANSPARENT]
    while prefix := next((prefix for prefix in _PREFIXES if parts[: len(prefix)] == prefix), None):
        parts = parts[len(prefix) :]
    return ".".join(parts)


def _always_trained(outer: str | Sequence[str], outside: _Named, blocks: list[Block], known: _Model) -> set:
    """`id`s of the outside parameters that `grass.outer` lets train."""
    everything = {id(param) for _, param in outside}
    if outer in ("always", "never"):
        return everything if outer == "always" else set()
    if isinstance(outer, str):
        raise ValueError(f'grass.outer is \'{outer}\'; use "always", "never" or a list of module paths')
    objects = {**known.modules, **dict(known.root.named_parameters(remove_duplicate=False))}
    in_blocks = {id(part) for b in blocks for part in (*b.module.modules(), *b.module.parameters())}
    always: set[int] = set()
    for path in outer:
        matches = _resolve(path, objects)
        target = objects[matches[0]] if matches else nn.Module()
        params = {id(p) for p in ([target] if isinstance(target, Parameter) else target.parameters())}
        always |= params & everything
        if not matches:
            names = [name for name, item in objects.items() if id(item) not in in_blocks]
            near = " or ".join(difflib.get_close_matches(path, names, n=3))
            problem = f"is not in the model{near and '; did you mean '}{near}"
        elif len(matches) > 1:
            problem = f"may be {' or '.join(matches)}; write the full path"
        elif id(target) in in_blocks and not params <= everything:
            problem = "lies inside a drawn block"
        elif not params & everything:
            problem = "holds no trainable parameter outside the drawn blocks"
        else:
            continue
        owners = list(dict.fromkeys(name.rpartition(".")[0] or name for name, _ in outside))
        shown = ", ".join(owners[:6]) + (", ..." if len(owners) > 6 else "")
        raise ValueError(f"grass.outer names '{path}', which {problem}; outside the blocks: {shown or None}")
    return always


def _candidates(found: list[list[_Entry]], known: _Model) -> str:
    """Text that names the six largest lists with their number of entries and share."""
    rows = []
    sizes = known.list_sizes(found)
    for size, entries in sorted(zip(sizes, found, strict=True), key=lambda row: -row[0])[:6]:
        names = [name or "the model itself" for name in _list_names(entries)]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        rows.append(f"{shown} ({len(entries)} entries, {size / max(known.numel, 1):.0%} of what can train)")
    if not rows:
        single = [path for path, module in known.modules.items() if len(_entries(path, module)) == 1]
        one = ", ".join(path or "the model itself" for path in single[:6])
        rows = [f"none with two entries or more; with one: {one or 'none'}"]
    return f"lists in this model: {'; '.join(rows)}"
