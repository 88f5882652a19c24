// assemble_pack: the documents of one pack copied out of shards, with labels, positions and segment boundaries.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "index.hpp"

namespace dasd {

struct Shard {
  const uint32_t* tokens;  // [total]; on the device where `resident`
  int64_t total;
  const int64_t* offsets;  // [documents + 1]
  int64_t documents;
  const int32_t* spans;  // [rows, 3] (document, begin, end), sorted by document, then begin
  int64_t rows;
};

// Shards whose documents are numbered through.
class Shards {
 public:
  explicit Shards(std::vector<Shard> all);
  int64_t documents() const { return first_.back(); }
  const Shard& find(int64_t doc, int64_t& local) const;  // local: the document's number in its shard

 private:
  std::vector<Shard> all_;
  std::vector<int64_t> first_;  // [shards + 1]
};

// One pack, checked: where its documents, their spans and its segments lie.
struct Pack {
  std::vector<Segment> segments;
  std::vector<Span> spans;
  std::vector<int32_t> cu_seqlens{0};  // padding is the last segment
  int32_t max_seqlen = 0, used = 0, num_valid = 0, capacity = 0;

  PackView view() const {
    return {segments.data(), spans.data(), static_cast<int32_t>(segments.size()), used, capacity};
  }
};

// Throws std::invalid_argument that names the document when one is out of range, empty, has a wrong span or does not
// fit.
Pack resolve(const Shards& shards, std::span<const int64_t> docs, int32_t capacity);

// Writes a whole pack in loops over documents and spans, the fastest way on a CPU.
void assemble_pack(const Pack& pack, const PackOut& out);

// The labels that each of the documents yields.
void label_counts(const Shard& shard, std::span<const int64_t> docs, int64_t* counts);

}  // namespace dasd
