// The order in which grass::squared_norm adds, so that every kernel rounds alike.
//
// A segment is kRows rows of kLanes values. Rows are added one after the other, lane by lane; then the lanes are folded,
// the upper half onto the lower, until one is left. The sums of segments are values of the next level, until one sum is
// left. A segment that ends early is filled up with zeros, which change no sum of squares.
#pragma once

#include <cstdint>

#include "formats.h"

namespace grass {

constexpr int kRows = 16;
constexpr int kLanes = 256;
constexpr int kSegment = kRows * kLanes;

inline int64_t num_segments(int64_t numel) { return (numel + kSegment - 1) / kSegment; }

// What is added: the squares on the first level, the sums as they are above.
template <typename Values>
struct Squares {
  using Stored = typename Values::Stored;
  static GRASS_INLINE float term(Stored stored) {
    const float value = Values::load(stored);
    return value * value;
  }
};

// Calls `visit(Squares<...>{})` for values of a format.
template <typename Visitor>
auto visit_squares(Format format, const Visitor& visit) {
  if (format == Format::kFp32) return visit(Squares<Fp32>{});
  if (format == Format::kFp16) return visit(Squares<Fp16>{});
  return visit(Squares<Bf16>{});
}

struct Sums {
  using Stored = float;
  static GRASS_INLINE float term(float sum) { return sum; }
};

}  // namespace grass
