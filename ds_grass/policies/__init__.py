"""The policies that choose blocks, by the name that `grass.policy` gives them.

Another policy is one file with one class (see `ds_grass.sampler.Policy`), one line here and its name in
config.py.
"""

from __future__ import annotations

from ds_grass.policies.cyclic import CyclicPolicy
from ds_grass.policies.grass import GrassPolicy
from ds_grass.policies.lisa import LisaPolicy
from ds_grass.policies.static import StaticPolicy
from ds_grass.policies.top_k import TopKPolicy
from ds_grass.sampler import Policy

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (GrassPolicy, StaticPolicy, TopKPolicy, LisaPolicy, CyclicPolicy)
}


def make_policy(name: str) -> Policy:
    """The policy of that name; ValueError names those there are."""
    if name not in POLICIES:
        raise ValueError(f"grass.policy is {name!r}; allowed: {', '.join(POLICIES)}")
    return POLICIES[name]()
