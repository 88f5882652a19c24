// A small counter-based generator (SplitMix64, Steele et al. 2014) and a shuffle whose result is the same on
// every platform, which std::shuffle and std::uniform_int_distribution do not promise.
#pragma once
#include <cstdint>
#include <span>
#include <utility>

namespace dasd {

class Rng {
 public:
  // Every (seed, epoch, stream) has its own start; hashing twice keeps neighbouring seeds and epochs apart.
  Rng(uint64_t seed, uint64_t epoch, uint64_t stream)
      : state_(mix(mix(mix(seed) + epoch) + stream)) {}

  uint64_t next() { return mix(state_ += kGamma); }

  // Uniform in [0, n), without bias: Lemire's multiplication with rejection.
  uint32_t below(uint32_t n) {
    uint64_t product = (next() >> 32) * n;
    if (static_cast<uint32_t>(product) < n) {
      const uint32_t threshold = -n % n;
      while (static_cast<uint32_t>(product) < threshold) product = (next() >> 32) * n;
    }
    return static_cast<uint32_t>(product >> 32);
  }

  template <typename T>
  void shuffle(std::span<T> items) {  // Fisher-Yates
    for (uint32_t i = static_cast<uint32_t>(items.size()); i > 1; --i) {
      std::swap(items[i - 1], items[below(i)]);
    }
  }

 private:
  static constexpr uint64_t kGamma = 0x9e3779b97f4a7c15ull;

  static uint64_t mix(uint64_t z) {
    z += kGamma;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }

  uint64_t state_;
};

}  // namespace dasd
