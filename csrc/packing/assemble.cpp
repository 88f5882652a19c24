#include "assemble.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "index.hpp"

namespace dasd {
namespace {

[[noreturn]] void fail(int64_t doc, const std::string& what) {
  throw std::invalid_argument("document " + std::to_string(doc) + " " + what);
}

// The vectors behind a PackView.
struct Resolved {
  std::vector<int64_t> first_token, first_span, last_span;
  std::vector<int32_t> cu{0};

  PackView view(const Shard& shard) const {
    return {shard.tokens,      first_token.data(), cu.data(), shard.spans, first_span.data(), last_span.data(),
            static_cast<int64_t>(first_token.size())};
  }
};

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

void check_spans(const Shard& shard, int64_t doc, int64_t length, int64_t first, int64_t last) {
  int32_t before = 0;
  for (int64_t row = first; row < last; ++row) {
    const int32_t begin = span_begin(shard.spans, row), end = span_end(shard.spans, row);
    if (begin < before || end <= begin || end > length) {
      fail(doc, "has " + std::to_string(length) + " tokens, but its loss span (" + std::to_string(begin) + ", " +
                    std::to_string(end) + ") in row " + std::to_string(row) +
                    " is empty, out of range, or overlaps the one before it");
    }
    before = end;
  }
}

Resolved resolve(const Shard& shard, const int64_t* docs, int64_t num_docs, int64_t capacity) {
  Resolved pack;
  int64_t used = 0;
  for (int64_t i = 0; i < num_docs; ++i) {
    const int64_t doc = docs[i];
    if (doc < 0 || doc >= shard.documents) {
      fail(doc, "does not exist: the shard has " + std::to_string(shard.documents) + " documents");
    }
    const int64_t begin = shard.offsets[doc], end = shard.offsets[doc + 1];
    if (begin < 0 || end <= begin || end > shard.total) {
      fail(doc, "has the offsets " + std::to_string(begin) + " to " + std::to_string(end) +
                    ", which is no range of the " + std::to_string(shard.total) + " tokens");
    }
    if (end - begin > capacity - used) {
      fail(doc, "of " + std::to_string(end - begin) + " tokens does not fit: " + std::to_string(used) + " of " +
                    std::to_string(capacity) + " are taken");
    }
    used += end - begin;
    const int64_t first = first_row(shard, doc), last = first_row(shard, doc + 1);
    check_spans(shard, doc, end - begin, first, last);
    pack.first_token.push_back(begin);
    pack.first_span.push_back(first);
    pack.last_span.push_back(last);
    pack.cu.push_back(static_cast<int32_t>(used));
  }
  return pack;
}

PackInfo describe(const PackView& pack, int64_t capacity) {
  PackInfo info;
  info.cu_seqlens.assign(pack.cu, pack.cu + pack.segments + 1);
  info.num_tokens = pack.cu[pack.segments];
  if (info.num_tokens < capacity) info.cu_seqlens.push_back(static_cast<int32_t>(capacity));
  for (size_t s = 1; s < info.cu_seqlens.size(); ++s) {
    info.max_seqlen = std::max(info.max_seqlen, info.cu_seqlens[s] - info.cu_seqlens[s - 1]);
  }
  return info;
}

}  // namespace

PackInfo assemble_pack(const Shard& shard, const int64_t* docs, int64_t num_docs, int64_t capacity,
                       int64_t* tokens, int64_t* labels, int64_t* positions) {
  const Resolved resolved = resolve(shard, docs, num_docs, capacity);
  const PackView pack = resolved.view(shard);
  PackInfo info = describe(pack, capacity);
  std::fill(labels, labels + capacity, kIgnore);
  for (int64_t s = 0; s < pack.segments; ++s) {
    const uint32_t* document = pack.tokens + pack.first_token[s];
    std::copy(document, document + (pack.cu[s + 1] - pack.cu[s]), tokens + pack.cu[s]);
    std::iota(positions + pack.cu[s], positions + pack.cu[s + 1], int64_t{0});
    for (int64_t row = pack.first_span[s]; row < pack.last_span[s]; ++row) {
      const Range range = labelled(pack.spans, row);
      std::copy(document + range.begin + 1, document + range.end + 1, labels + pack.cu[s] + range.begin);
      info.num_valid += range.end - range.begin;
    }
  }
  std::fill(tokens + info.num_tokens, tokens + capacity, int64_t{0});
  std::iota(positions + info.num_tokens, positions + capacity, int64_t{0});
  return info;
}

PackInfo assemble_pack_elementwise(const Shard& shard, const int64_t* docs, int64_t num_docs, int64_t capacity,
                                   int64_t* tokens, int64_t* labels, int64_t* positions) {
  const Resolved resolved = resolve(shard, docs, num_docs, capacity);
  const PackView pack = resolved.view(shard);
  PackInfo info = describe(pack, capacity);
  for (int32_t t = 0; t < capacity; ++t) {
    const Element at = element(pack, t);
    tokens[t] = at.token;
    labels[t] = at.label;
    positions[t] = at.position;
    info.num_valid += at.label != kIgnore;
  }
  return info;
}

}  // namespace dasd
