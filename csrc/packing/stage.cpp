#include "stage.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

namespace dasd {
namespace {

static_assert(std::is_trivially_copyable_v<Job> && sizeof(void*) == 8);

// Puts a section at the end of the buffer and returns where it begins.
int64_t place(int64_t& bytes, size_t size) {
  const int64_t begin = bytes;
  bytes += static_cast<int64_t>((size + 15) / 16 * 16);
  return begin;
}

template <typename T>
void copy(char* to, const std::vector<T>& from) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(T));
}

}  // namespace

Stage::Stage(std::vector<Pack> packs, bool resident)
    : packs_(std::move(packs)), resident_(resident), bytes_(0) {
  place(bytes_, packs_.size() * sizeof(Job));
  for (const Pack& pack : packs_) {
    segments_.push_back(place(bytes_, pack.segments.size() * sizeof(Segment)));
    spans_.push_back(place(bytes_, pack.spans.size() * sizeof(Span)));
    cu_.push_back(place(bytes_, pack.cu_seqlens.size() * sizeof(int32_t)));
    tokens_.push_back(place(bytes_, resident ? 0 : static_cast<size_t>(pack.used) * sizeof(uint32_t)));
  }
}

void Stage::write(char* host, uintptr_t device, uintptr_t rows, int64_t stride, uintptr_t valid) const {
  std::vector<Job> jobs;
  for (size_t i = 0; i < packs_.size(); ++i) {
    const Pack& pack = packs_[i];
    std::vector<Segment> segments = pack.segments;
    for (Segment& segment : segments) {
      if (resident_) break;
      const int64_t offset = tokens_[i] + int64_t{segment.first} * 4;
      std::memcpy(host + offset, segment.tokens, static_cast<size_t>(segment.length) * 4);
      segment.tokens = reinterpret_cast<const uint32_t*>(device + static_cast<uintptr_t>(offset));
    }
    copy(host + segments_[i], segments);
    copy(host + spans_[i], pack.spans);
    copy(host + cu_[i], pack.cu_seqlens);
    Job job{pack.view(), {}};
    job.pack.segments = reinterpret_cast<const Segment*>(device + static_cast<uintptr_t>(segments_[i]));
    job.pack.spans = reinterpret_cast<const Span*>(device + static_cast<uintptr_t>(spans_[i]));
    auto* row = reinterpret_cast<int64_t*>(rows) + 3 * stride * static_cast<int64_t>(i);
    job.out = {row, row + stride, row + 2 * stride, reinterpret_cast<int64_t*>(valid)};
    valid += static_cast<uintptr_t>(pack.num_valid) * sizeof(int64_t);
    jobs.push_back(job);
  }
  copy(host, jobs);
}

void run_jobs(const Job* jobs, int64_t packs) {
  for (int64_t i = 0; i < packs; ++i) {
    const Job& job = jobs[i];
    for (int32_t t = (job.pack.capacity - 1) / 4 * 4; t >= 0; t -= 4) write_four(job.pack, t, job.out);  // any order
  }
}

}  // namespace dasd
