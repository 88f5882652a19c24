// Best-fit decreasing in windows of shuffled documents, then steps of shuffled packs, then LPT over the ranks
// of a step.
//
// A bin that a window leaves open stays open for the next ones, so the small documents of later windows fill
// the holes of earlier packs, and a short last window adds no half-empty packs. The packs are shuffled
// afterwards, so carrying bins moves no document to an earlier or later step on average.
#include "plan.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <numeric>
#include <queue>
#include <span>
#include <tuple>
#include <utility>

#include "open_bins.hpp"
#include "rng.hpp"

namespace dasd {
namespace {

enum Stream : uint64_t { kDocuments = 0, kPacks = 1 };

struct Item {
  uint32_t room;  // capacity - length: ascending room is descending length
  int32_t doc;
};

// Stable radix sort by room, at most 11 bits a pass: 2,048 counters stay in the first cache.
class RoomSorter {
 public:
  RoomSorter(int64_t capacity, size_t window) : scratch_(window) {
    const int bits = std::max(1, static_cast<int>(std::bit_width(static_cast<uint64_t>(capacity - 1))));
    passes_ = (bits + 10) / 11;
    digit_bits_ = (bits + passes_ - 1) / passes_;
  }

  // Returns the sorted items, which lie in `items` or in the scratch memory until the next call.
  std::span<const Item> operator()(std::span<Item> items) {
    std::span<Item> from = items, to = std::span(scratch_).first(items.size());
    for (int pass = 0; pass < passes_; ++pass) {
      const int shift = pass * digit_bits_;
      const uint32_t mask = (1u << digit_bits_) - 1;
      std::array<uint32_t, 2048> start{};
      for (const Item& item : from) ++start[item.room >> shift & mask];
      uint32_t sum = 0;
      for (uint32_t& count : start) sum += std::exchange(count, sum);
      for (const Item& item : from) to[start[item.room >> shift & mask]++] = item;
      std::swap(from, to);
    }
    return from;
  }

 private:
  std::vector<Item> scratch_;
  int passes_, digit_bits_;
};

struct Bin {
  int64_t docs = 0, tokens = 0;
  double cost = 0.0;
};

struct Placed {
  int32_t bin, doc;
};

struct Placement {
  std::vector<Placed> order;  // [n] in the order of placing
  std::vector<Bin> bins;
};

Placement place(const PlanRequest& request) {
  const auto n = static_cast<size_t>(request.n);
  std::vector<Item> items(n);
  int64_t tokens = 0;
  for (size_t doc = 0; doc < n; ++doc) {
    tokens += request.lengths[doc];
    items[doc] = {static_cast<uint32_t>(request.capacity - request.lengths[doc]), static_cast<int32_t>(doc)};
  }
  Rng(request.seed, request.epoch, kDocuments).shuffle(std::span(items));

  Placement placed;
  placed.order.reserve(n);
  placed.bins.reserve(static_cast<size_t>(tokens / request.capacity + tokens / request.capacity / 64 + 64));
  OpenBins open(request.capacity);
  const size_t window = static_cast<size_t>(std::min(request.window, request.n));
  RoomSorter sort(request.capacity, window);
  for (size_t begin = 0; begin < n; begin += window) {
    for (const Item& item : sort(std::span(items).subspan(begin, std::min(window, n - begin)))) {
      const int64_t length = request.capacity - item.room;
      const int64_t found = open.best_fit(length);
      const int32_t bin = found < 0 ? static_cast<int32_t>(placed.bins.size()) : open.pop(found);
      if (found < 0) placed.bins.emplace_back();
      const int64_t remaining = (found < 0 ? request.capacity : found) - length;
      if (remaining > 0) open.push(remaining, bin);
      placed.order.push_back({bin, item.doc});
      const auto l = static_cast<double>(length);
      ++placed.bins[bin].docs;
      placed.bins[bin].tokens += length;
      placed.bins[bin].cost += request.linear * l + request.quadratic * (l * l);
    }
  }
  return placed;
}

// Gives the bins a random order and writes them as packs: docs, pack_offsets, tokens, cost.
void write_packs(const PlanRequest& request, const Placement& placed, Plan& plan) {
  const size_t packs = placed.bins.size();
  std::vector<int32_t> bin_of(packs);  // pack -> bin
  std::iota(bin_of.begin(), bin_of.end(), 0);
  Rng(request.seed, request.epoch, kPacks).shuffle(std::span(bin_of));

  plan.pack_offsets.resize(packs + 1);
  plan.tokens.resize(packs);
  plan.cost.resize(packs);
  std::vector<int64_t> cursor(packs);  // by bin: where its next document goes
  int64_t offset = 0;
  for (size_t pack = 0; pack < packs; ++pack) {
    const Bin& bin = placed.bins[bin_of[pack]];
    plan.pack_offsets[pack] = cursor[bin_of[pack]] = offset;
    plan.tokens[pack] = bin.tokens;
    plan.cost[pack] = bin.cost;
    offset += bin.docs;
  }
  plan.pack_offsets[packs] = offset;

  plan.docs.resize(placed.order.size());
  for (const auto [bin, doc] : placed.order) plan.docs[cursor[bin]++] = doc;
}

// Longest processing time first inside each step: the dearest pack goes to the rank with the least to do.
void balance(const PlanRequest& request, Plan& plan) {
  const auto packs = static_cast<int64_t>(plan.tokens.size());
  plan.rank.assign(plan.tokens.size(), 0);
  plan.step_offsets.assign(1, 0);
  std::vector<std::pair<double, int64_t>> order;  // minus the cost, pack
  using Load = std::tuple<double, int64_t, int32_t>;  // cost, packs, rank: a tie goes to fewer packs
  for (int64_t begin = 0; begin < packs;) {
    const int64_t end = begin + std::min(request.pack_budget, packs - begin);
    plan.step_offsets.push_back(end);
    if (request.ranks > 1) {
      order.clear();
      for (int64_t pack = begin; pack < end; ++pack) order.emplace_back(-plan.cost[pack], pack);
      std::sort(order.begin(), order.end());
      std::vector<Load> loads;
      for (int32_t rank = 0; rank < request.ranks; ++rank) loads.emplace_back(0.0, 0, rank);
      std::priority_queue<Load, std::vector<Load>, std::greater<>> least(std::greater<>{}, std::move(loads));
      for (const auto& [minus_cost, pack] : order) {
        const auto [cost, count, rank] = least.top();
        least.pop();
        plan.rank[pack] = rank;
        least.emplace(cost - minus_cost, count + 1, rank);
      }
    }
    begin = end;
  }
}

}  // namespace

Plan plan_packs(const PlanRequest& request) {
  Plan plan;
  write_packs(request, place(request), plan);
  balance(request, plan);
  return plan;
}

}  // namespace dasd
