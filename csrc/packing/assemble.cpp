#include "assemble.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace dasd {
namespace {

[[noreturn]] void fail(int64_t doc, const std::string& what) {
  throw std::invalid_argument("document " + std::to_string(doc) + " " + what);
}

// The first row whose document is not less than `doc`.
int64_t first_row(const Shard& shard, int64_t doc) {
  int64_t low = 0, high = shard.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (shard.spans[3 * middle] < doc) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

int32_t labels_of(const Span& span) { return span.end - 1 - first_label(span); }

// Appends the spans of a document of `length` tokens to the pack and counts their labels.
void add_spans(Pack& pack, const Shard& shard, int64_t local, int64_t doc, int64_t length) {
  int32_t before = 0;
  const int64_t last = first_row(shard, local + 1);
  for (int64_t row = first_row(shard, local); row < last; ++row) {
    const Span span{pack.num_valid, shard.spans[3 * row + 1], shard.spans[3 * row + 2]};
    if (span.begin < before || span.end <= span.begin || span.end > length) {
      fail(doc, "has " + std::to_string(length) + " tokens, but its loss span (" + std::to_string(span.begin) + ", " +
                    std::to_string(span.end) + ") in row " + std::to_string(row) +
                    " is empty, out of range, or overlaps the one before it");
    }
    before = span.end;
    pack.spans.push_back(span);
    pack.num_valid += labels_of(span);
  }
}

}  // namespace

Shards::Shards(std::vector<Shard> all) : all_(std::move(all)), first_{0} {
  for (const Shard& shard : all_) first_.push_back(first_.back() + shard.documents);
}

const Shard& Shards::find(int64_t doc, int64_t& local) const {
  if (doc < 0 || doc >= documents()) {
    fail(doc, "does not exist: the shard has " + std::to_string(documents()) + " documents");
  }
  const auto after = std::upper_bound(first_.begin(), first_.end(), doc);
  local = doc - after[-1];
  return all_[static_cast<size_t>(after - first_.begin() - 1)];
}

Pack resolve(const Shards& shards, std::span<const int64_t> docs, int32_t capacity) {
  Pack pack;
  pack.capacity = capacity;
  for (const int64_t doc : docs) {
    int64_t local;
    const Shard& shard = shards.find(doc, local);
    const int64_t begin = shard.offsets[local], end = shard.offsets[local + 1];
    if (begin < 0 || end <= begin || end > shard.total) {
      fail(doc, "has the offsets " + std::to_string(begin) + " to " + std::to_string(end) +
                    ", which is no range of the " + std::to_string(shard.total) + " tokens");
    }
    if (end - begin > capacity - pack.used) {
      fail(doc, "of " + std::to_string(end - begin) + " tokens does not fit: " + std::to_string(pack.used) + " of " +
                    std::to_string(capacity) + " are taken");
    }
    const auto length = static_cast<int32_t>(end - begin);
    const auto span = static_cast<int32_t>(pack.spans.size());
    add_spans(pack, shard, local, doc, length);
    pack.segments.push_back(
        {shard.tokens + begin, pack.used, length, span, static_cast<int32_t>(pack.spans.size())});
    pack.used += length;
    pack.cu_seqlens.push_back(pack.used);
    pack.max_seqlen = std::max(pack.max_seqlen, length);
  }
  if (pack.used < capacity) {
    pack.cu_seqlens.push_back(capacity);
    pack.max_seqlen = std::max(pack.max_seqlen, capacity - pack.used);
  }
  return pack;
}

void assemble_pack(const Pack& pack, const PackOut& out) {
  std::fill_n(out.labels, pack.capacity, kIgnore);
  int64_t* valid = out.valid;
  for (const Segment& segment : pack.segments) {
    std::copy_n(segment.tokens, segment.length, out.tokens + segment.first);
    std::iota(out.positions + segment.first, out.positions + segment.first + segment.length, int64_t{0});
    for (int32_t row = segment.span; row < segment.span_end; ++row) {
      const int32_t begin = first_label(pack.spans[row]), count = labels_of(pack.spans[row]);
      std::copy_n(segment.tokens + begin + 1, count, out.labels + segment.first + begin);
      std::iota(valid, valid + count, int64_t{segment.first} + begin);
      valid += count;
    }
  }
  std::fill(out.tokens + pack.used, out.tokens + pack.capacity, int64_t{0});
  std::iota(out.positions + pack.used, out.positions + pack.capacity, int64_t{0});
}

void label_counts(const Shard& shard, std::span<const int64_t> docs, int64_t* counts) {
  for (const int64_t doc : docs) {
    int64_t count = 0;
    for (int64_t row = first_row(shard, doc); row < shard.rows && shard.spans[3 * row] == doc; ++row) {
      count += labels_of({0, shard.spans[3 * row + 1], shard.spans[3 * row + 2]});
    }
    *counts++ = count;
  }
}

}  // namespace dasd
