// assemble_pack: the documents of one pack copied out of a shard, with labels, positions and segment
// boundaries.
#pragma once
#include <cstdint>
#include <vector>

namespace dasd {

struct Shard {
  const uint32_t* tokens;  // [total]
  int64_t total;
  const int64_t* offsets;  // [documents + 1]
  int64_t documents;
  const int32_t* spans;  // [rows, 3] (document, begin, end), sorted by document, then begin
  int64_t rows;
};

struct PackInfo {
  std::vector<int32_t> cu_seqlens;  // padding is the last segment
  int32_t max_seqlen = 0;
  int64_t num_valid = 0, num_tokens = 0;
};

// Fills tokens, labels and positions, [capacity] each. Throws std::invalid_argument that names the document
// when one is out of range, empty, has a wrong span or does not fit.
PackInfo assemble_pack(const Shard& shard, const int64_t* docs, int64_t num_docs, int64_t capacity,
                       int64_t* tokens, int64_t* labels, int64_t* positions);

// The same, one position at a time through element() of index.hpp, as the device does it. For tests.
PackInfo assemble_pack_elementwise(const Shard& shard, const int64_t* docs, int64_t num_docs, int64_t capacity,
                                   int64_t* tokens, int64_t* labels, int64_t* positions);

}  // namespace dasd
