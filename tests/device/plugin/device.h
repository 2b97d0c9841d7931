// What the three parts of the test device share: memory, collectives and kernels. See ../README.md.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "paddle/phi/backends/device_ext.h"

namespace sandbox {

const char* device_type();  // "sandbox", or what SANDBOX_TYPE says

// Read and reset by ../counters.py; the order of the fields is the order there.
struct Counters {
  std::atomic<int64_t> h2d_calls, h2d_bytes, d2h_calls, d2h_bytes, d2d_calls, d2d_bytes;
  std::atomic<int64_t> kernel_calls, collective_calls, allocated_bytes, peak_bytes;
};
extern Counters counters;

// The address that Paddle has is mapped without access; the same memory lies at another address for the plug-in alone.
bool is_device(const void* address);
void* alias(const void* device_address);
void* allocate(size_t size);  // nullptr when the device is full; filled with NaN
void release(void* device_address, size_t size);

void world_sum(double* values, size_t count);  // over the ranks of the first group that this process joined
void fill_collectives(C_DeviceInterface* interface);
void register_kernels();
void register_norms();
void axpby(C_DataType dtype, size_t count, float alpha, const void* x, float beta, void* y);

size_t size_of(C_DataType dtype);
[[noreturn]] void die(const char* what, const char* name = "");

}  // namespace sandbox
