// plan_packs: which documents share a pack, which packs share an optimizer step, which rank computes a pack.
#pragma once
#include <cstdint>
#include <vector>

namespace dasd {

struct PlanRequest {
  const int64_t* lengths;  // [n], each in 1..capacity (the caller checks)
  int64_t n;               // < 2^31
  int64_t capacity;        // < 2^31
  int64_t pack_budget;     // packs a step over all ranks
  int64_t window;          // documents sorted together
  int32_t ranks;
  uint64_t seed, epoch;
  double linear, quadratic;  // cost of a document: linear * l + quadratic * l^2
};

struct Plan {
  std::vector<int64_t> docs;          // [n] document indices, pack after pack
  std::vector<int64_t> pack_offsets;  // [P + 1] into docs
  std::vector<int64_t> step_offsets;  // [S + 1] into packs
  std::vector<int64_t> tokens;        // [P]
  std::vector<double> cost;           // [P]
  std::vector<int32_t> rank;          // [P]
};

// A pure function of its request; everything but `rank` is independent of `ranks`.
Plan plan_packs(const PlanRequest& request);

}  // namespace dasd
