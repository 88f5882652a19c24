// What a device needs to write packs: one buffer, filled on the host and copied over as it is, 4 bytes a token. It
// holds a Job a pack, their segments, spans and cu_seqlens, and the tokens that are not on the device already.
#pragma once
#include <cstdint>
#include <vector>

#include "assemble.hpp"
#include "index.hpp"

namespace dasd {

struct Job {
  PackView pack;
  PackOut out;
};

class Stage {
 public:
  // resident: the shards' tokens lie on the device, and Shard::tokens are addresses there.
  Stage(std::vector<Pack> packs, bool resident);

  const std::vector<Pack>& packs() const { return packs_; }
  int64_t bytes() const { return bytes_; }
  int64_t cu_seqlens(size_t pack) const { return cu_[pack]; }  // where a pack's boundaries lie in the buffer

  // Fills the buffer at `host`, which will be read at `device`, both multiples of 16. Packs go to `rows`, int64
  // [packs, 3, stride], stride a multiple of 4, and their labelled positions to `valid`, one pack's after the other's.
  void write(char* host, uintptr_t device, uintptr_t rows, int64_t stride, uintptr_t valid) const;

 private:
  std::vector<Pack> packs_;
  bool resident_;
  std::vector<int64_t> segments_, spans_, cu_, tokens_;  // [packs] offsets in the buffer
  int64_t bytes_;
};

// The device's work, a thread after the other, for tests: what pack.cu does to a buffer that was written for itself.
void run_jobs(const Job* jobs, int64_t packs);

}  // namespace dasd
