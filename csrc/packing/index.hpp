// The index arithmetic of assemble_pack: which document, token and label a position of a pack holds. Plain
// functions of pointers, compiled for the host by assemble.cpp and for the device by a .cu, so that both have
// one definition.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define DASD_HD __host__ __device__ inline
#else
#define DASD_HD inline
#endif

namespace dasd {

constexpr int64_t kIgnore = -100;  // the label of a token that is not trained

// One pack, resolved: segment s holds positions cu[s] .. cu[s + 1] and is a whole document; after the last
// one comes padding.
struct PackView {
  const uint32_t* tokens;      // the shard's tokens
  const int64_t* first_token;  // [segments] where each document begins in `tokens`
  const int32_t* cu;           // [segments + 1], cu[0] = 0
  const int32_t* spans;        // [K, 3] rows (document, begin, end)
  const int64_t* first_span;   // [segments] first row of each document
  const int64_t* last_span;    // [segments] one past its last row
  int64_t segments;
};

struct Element {
  int64_t token, label, position;
};

struct Range {
  int32_t begin, end;
};

DASD_HD int32_t span_begin(const int32_t* spans, int64_t row) { return spans[3 * row + 1]; }
DASD_HD int32_t span_end(const int32_t* spans, int64_t row) { return spans[3 * row + 2]; }

// The positions inside a document whose next token lies in the span: they carry a label. A document's first
// token is nobody's next token, so a span that starts at 0 yields one label less than it has tokens.
DASD_HD Range labelled(const int32_t* spans, int64_t row) {
  const int32_t begin = span_begin(spans, row);
  return {begin > 0 ? begin - 1 : 0, span_end(spans, row) - 1};
}

// The segment of a position that is not padding: the last s with cu[s] <= position.
DASD_HD int64_t segment_of(const int32_t* cu, int64_t segments, int32_t position) {
  int64_t low = 0, high = segments;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (cu[middle] <= position) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Whether token `index` of a document lies in one of its spans, which are sorted and disjoint: rows first ..
// last.
DASD_HD bool in_spans(const int32_t* spans, int64_t first, int64_t last, int32_t index) {
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (span_end(spans, middle) <= index) {
      first = middle + 1;
    } else if (span_begin(spans, middle) > index) {
      last = middle;
    } else {
      return true;
    }
  }
  return false;
}

// Position t of the pack on its own: what one device thread computes.
DASD_HD Element element(const PackView& pack, int32_t t) {
  const int32_t used = pack.cu[pack.segments];
  if (t >= used) return {0, kIgnore, t - used};
  const int64_t s = segment_of(pack.cu, pack.segments, t);
  const int32_t index = t - pack.cu[s];
  const uint32_t* document = pack.tokens + pack.first_token[s];
  const bool trained =
      t + 1 < pack.cu[s + 1] && in_spans(pack.spans, pack.first_span[s], pack.last_span[s], index + 1);
  return {document[index], trained ? static_cast<int64_t>(document[index + 1]) : kIgnore, index};
}

}  // namespace dasd
