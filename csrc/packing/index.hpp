// The index arithmetic of assemble_pack: which document, token and label a position of a pack holds. Plain functions
// of pointers, compiled for the host by stage.cpp and for the device by pack.cu, so that both have one definition.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DASD_HD __host__ __device__ inline
#else
#define DASD_HD inline
#endif

namespace dasd {

constexpr int64_t kIgnore = -100;  // the label of a token that is not trained

// Trained tokens begin .. end - 1 of a document; `before` labels of the pack lie in front of them.
struct Span {
  int32_t before, begin, end;
};

// A document of a pack: positions first .. first + length - 1, spans span .. span_end - 1.
struct Segment {
  const uint32_t* tokens;
  int32_t first, length;
  int32_t span, span_end;
};

// A pack: `count` segments fill the positions before `used`, padding the rest.
struct PackView {
  const Segment* segments;
  const Span* spans;
  int32_t count, used, capacity;
};

// Where a pack is written, [capacity] each on 16-byte boundaries, and `valid`, the positions that carry a label.
struct PackOut {
  int64_t *tokens, *labels, *positions, *valid;
};

// The positions inside a document whose next token lies in the span carry a label, from this one on: a document's
// first token is nobody's next token, so a span that starts at 0 yields one label less than it has tokens.
DASD_HD int32_t first_label(const Span& span) { return span.begin > 0 ? span.begin - 1 : 0; }

// The segment of a position that is not padding: the last that begins at or before it.
DASD_HD int32_t segment_of(const PackView& pack, int32_t position) {
  int32_t low = 0, high = pack.count;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (pack.segments[middle].first <= position) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The first span of a segment that ends after token `index`.
DASD_HD int32_t span_after(const PackView& pack, const Segment& segment, int32_t index) {
  int32_t low = segment.span, high = segment.span_end;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (pack.spans[middle].end <= index) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The label of the token before `next`, whose token this is; notes in `valid` that position t has one.
DASD_HD int64_t label(const PackView& pack, const Segment& segment, int32_t span, int32_t next, uint32_t token,
                      int32_t t, int64_t* valid) {
  if (next >= segment.length || span >= segment.span_end || pack.spans[span].begin > next) return kIgnore;
  valid[pack.spans[span].before + (next - 1 - first_label(pack.spans[span]))] = t;
  return token;
}

// Position t of a pack on its own.
DASD_HD void write_one(const PackView& pack, int32_t t, const PackOut& out) {
  if (t >= pack.used) {
    out.tokens[t] = 0;
    out.labels[t] = kIgnore;
    out.positions[t] = t - pack.used;
    return;
  }
  const Segment segment = pack.segments[segment_of(pack, t)];
  const int32_t index = t - segment.first, next = index + 1;
  const uint32_t following = next < segment.length ? segment.tokens[next] : 0;
  out.tokens[t] = segment.tokens[index];
  out.labels[t] = label(pack, segment, span_after(pack, segment, next), next, following, t, out.valid);
  out.positions[t] = index;
}

// 16 bytes from an address that is a multiple of 16: one load.
DASD_HD void load_four(const uint32_t* from, uint32_t* to) {
#ifdef __CUDA_ARCH__
  const uint4 line = __ldg(reinterpret_cast<const uint4*>(from));
  to[0] = line.x, to[1] = line.y, to[2] = line.z, to[3] = line.w;
#else
  std::memcpy(to, from, 16);
#endif
}

// Four values to an address that is a multiple of 16: two stores of 16 bytes.
DASD_HD void store_four(int64_t* to, int64_t a, int64_t b, int64_t c, int64_t d) {
#ifdef __CUDA_ARCH__
  reinterpret_cast<longlong2*>(to)[0] = make_longlong2(a, b);
  reinterpret_cast<longlong2*>(to)[1] = make_longlong2(c, d);
#else
  to[0] = a, to[1] = b, to[2] = c, to[3] = d;
#endif
}

// Tokens 0 .. 4 after `from`, whatever its alignment: they lie in two neighbouring lines of 16 bytes. A line is read
// only where it holds one of the `left` tokens that are the document's, so nothing beyond its memory's lines is.
DASD_HD void load_five(const uint32_t* from, int32_t left, uint32_t* five) {
  const uint32_t shift = reinterpret_cast<uintptr_t>(from) / 4 % 4;
  uint32_t line[8] = {};
  load_four(from - shift, line);
  if (static_cast<int32_t>(4 - shift) < left) load_four(from - shift + 4, line + 4);
  // Shifted by two, then by one: an index that is not constant would put the array into memory.
  for (int i = 0; i < 6; ++i) line[i] = shift & 2 ? line[i + 2] : line[i];
  for (int i = 0; i < 5; ++i) five[i] = shift & 1 ? line[i + 1] : line[i];
}

// Positions t .. t + 3 of a pack, t a multiple of 4: what one device thread does. Where they lie in one document, or
// in the padding, by 16 bytes at a time.
DASD_HD void write_four(const PackView& pack, int32_t t, const PackOut& out) {
  if (t + 4 > pack.capacity || (t < pack.used && t + 4 > pack.used)) {
    for (int32_t i = t; i < t + 4 && i < pack.capacity; ++i) write_one(pack, i, out);
    return;
  }
  if (t >= pack.used) {
    const int64_t index = t - pack.used;
    store_four(out.tokens + t, 0, 0, 0, 0);
    store_four(out.labels + t, kIgnore, kIgnore, kIgnore, kIgnore);
    store_four(out.positions + t, index, index + 1, index + 2, index + 3);
    return;
  }
  const Segment segment = pack.segments[segment_of(pack, t)];
  const int32_t index = t - segment.first;
  if (index + 4 > segment.length) {
    for (int32_t i = t; i < t + 4; ++i) write_one(pack, i, out);
    return;
  }
  uint32_t token[5];
  int64_t labels[4];
  load_five(segment.tokens + index, segment.length - index, token);
  int32_t span = span_after(pack, segment, index + 1);
  for (int32_t i = 0; i < 4; ++i) {
    const int32_t next = index + 1 + i;
    if (span < segment.span_end && pack.spans[span].end <= next) ++span;  // spans are not empty: one step is enough
    labels[i] = label(pack, segment, span, next, token[i + 1], t + i, out.valid);
  }
  store_four(out.tokens + t, token[0], token[1], token[2], token[3]);
  store_four(out.labels + t, labels[0], labels[1], labels[2], labels[3]);
  store_four(out.positions + t, index, index + 1, index + 2, index + 3);
}

// The place of position t in `valid`, ascending, or -1: which gathered row belongs to row t.
DASD_HD int64_t row_of(const int64_t* valid, int64_t count, int64_t t) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (valid[middle] < t) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && valid[low] == t ? low : -1;
}

}  // namespace dasd
