// A CPU allocator for tests that counts: what torch.cuda.memory_allocated and max_memory_allocated are on CUDA.
//
// It wraps whatever c10 allocator is in place when counting starts, so every tensor of every thread is seen, whoever
// made it. Memory that does not come from the allocator (mmap, torch.frombuffer) is not. Tensors made earlier keep
// their own deleter and are not counted in either direction.
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace {

struct Allocation {
  c10::DataPtr inner;
  int64_t bytes;
};

// Keyed by address: raw_allocate demands that a block's context is the block itself, so nothing can ride along in it.
struct Ledger {
  std::mutex mutex;
  std::unordered_map<void*, Allocation> allocations;
  int64_t live_bytes = 0;
  int64_t peak_bytes = 0;
};

Ledger& ledger() {
  static auto* instance = new Ledger;  // never freed: tensors may outlive everything
  return *instance;
}

void forget(void* data);

struct CountingAllocator final : c10::Allocator {
  c10::Allocator* inner = nullptr;

  c10::DataPtr allocate(size_t num_bytes) override {
    c10::DataPtr block = inner->allocate(num_bytes);
    void* data = block.get();
    if (data == nullptr) {
      return block;
    }
    const c10::Device device = block.device();
    const auto bytes = static_cast<int64_t>(num_bytes);
    std::lock_guard<std::mutex> lock(ledger().mutex);
    ledger().allocations.emplace(data, Allocation{std::move(block), bytes});
    ledger().live_bytes += bytes;
    ledger().peak_bytes = std::max(ledger().peak_bytes, ledger().live_bytes);
    return {data, data, &forget, device};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &forget; }

  void copy_data(void* dest, const void* src, std::size_t count) const override {
    default_copy_data(dest, src, count);
  }
};

CountingAllocator& counting() {
  static auto* allocator = new CountingAllocator;
  return *allocator;
}

void forget(void* data) {
  c10::DataPtr inner;  // freed after the lock
  {
    std::lock_guard<std::mutex> lock(ledger().mutex);
    auto found = ledger().allocations.find(data);
    if (found != ledger().allocations.end()) {
      ledger().live_bytes -= found->second.bytes;
      inner = std::move(found->second.inner);
      ledger().allocations.erase(found);
      return;
    }
  }
  // Not made here: oneDNN (an exact GELU, say) asks the allocator in place for a deleter of memory that it got elsewhere.
  if (data != nullptr) {
    counting().inner->raw_deleter()(data);
  }
}

}  // namespace

extern "C" {

void counting_start() {
  if (counting().inner == nullptr) {
    counting().inner = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&counting(), /*priority=*/100);
  }
}

int64_t counting_live_bytes() {
  std::lock_guard<std::mutex> lock(ledger().mutex);
  return ledger().live_bytes;
}

int64_t counting_peak_bytes() {
  std::lock_guard<std::mutex> lock(ledger().mutex);
  return ledger().peak_bytes;
}

void counting_reset_peak() {
  std::lock_guard<std::mutex> lock(ledger().mutex);
  ledger().peak_bytes = ledger().live_bytes;
}
}
