// A CPU allocator for tests that counts: what torch.cuda.memory_allocated and max_memory_allocated are on CUDA.
//
// It wraps whatever c10 allocator is in place when counting starts, so every tensor of every thread is seen, whoever
// made it. Memory that does not come from the allocator (mmap, torch.frombuffer) is not. Tensors made earlier keep
// their own deleter and are not counted in either direction.
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <cstdint>

namespace {

std::atomic<int64_t> live_bytes{0};
std::atomic<int64_t> peak_bytes{0};

struct Allocation {
  c10::DataPtr inner;
  int64_t bytes;
};

void free_allocation(void* context) {
  auto* allocation = static_cast<Allocation*>(context);
  live_bytes -= allocation->bytes;
  delete allocation;
}

struct CountingAllocator final : c10::Allocator {
  c10::Allocator* inner = nullptr;

  c10::DataPtr allocate(size_t num_bytes) override {
    auto* allocation = new Allocation{inner->allocate(num_bytes), static_cast<int64_t>(num_bytes)};
    const int64_t now = live_bytes += allocation->bytes;
    int64_t seen = peak_bytes;
    while (now > seen && !peak_bytes.compare_exchange_weak(seen, now)) {
    }
    return {allocation->inner.get(), allocation, &free_allocation, allocation->inner.device()};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* dest, const void* src, std::size_t count) const override {
    default_copy_data(dest, src, count);
  }
};

CountingAllocator& counting() {
  static auto* allocator = new CountingAllocator;  // never freed: tensors may outlive everything
  return *allocator;
}

}  // namespace

extern "C" {

void counting_start() {
  if (counting().inner == nullptr) {
    counting().inner = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&counting(), /*priority=*/100);
  }
}

int64_t counting_live_bytes() { return live_bytes; }
int64_t counting_peak_bytes() { return peak_bytes; }
void counting_reset_peak() { peak_bytes = live_bytes.load(); }
}
