// The test device's memory, copies and counters, and the table of functions that Paddle calls.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "device.h"

namespace sandbox {

Counters counters;

const char* device_type() {
  const char* told = std::getenv("SANDBOX_TYPE");
  return told ? told : "sandbox";
}

void die(const char* what, const char* name) {
  std::fprintf(stderr, "sandbox device: %s %s\n", what, name);
  std::fflush(stderr);
  std::abort();
}

size_t size_of(C_DataType dtype) {
  switch (dtype) {
    case BOOL: case UINT8: case INT8: return 1;
    case UINT16: case INT16: case FLOAT16: case BFLOAT16: return 2;
    case UINT32: case INT32: case FLOAT32: return 4;
    case UINT64: case INT64: case FLOAT64: case COMPLEX64: return 8;
    case COMPLEX128: return 16;
    default: die("unknown data type");
  }
}

namespace {

constexpr size_t kPage = 4096;
constexpr unsigned char kNan = 0xff;  // every floating-point type reads NaN, every integer -1
size_t capacity = size_t{8} << 30;    // address space; pages exist once they are written
char* front = nullptr;                // what Paddle sees: PROT_NONE
char* back = nullptr;                 // what the plug-in uses
std::mutex mutex;
std::map<size_t, size_t> holes;  // offset -> size of free ranges, never adjacent

void open_memory() {
  if (front) return;
  if (const char* told = std::getenv("SANDBOX_MEMORY_MB")) capacity = std::strtoull(told, nullptr, 10) << 20;
  int file = memfd_create("sandbox device", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, static_cast<off_t>(capacity)) != 0) die("no memory file");
  void* hidden = mmap(nullptr, capacity, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0);
  void* usable = mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (hidden == MAP_FAILED || usable == MAP_FAILED) die("the memory cannot be mapped");
  // A child made by fork would share the pages: it must not see them at all.
  madvise(hidden, capacity, MADV_DONTFORK);
  madvise(usable, capacity, MADV_DONTFORK);
  close(file);
  front = static_cast<char*>(hidden);
  back = static_cast<char*>(usable);
  holes[0] = capacity;
}

size_t rounded(size_t size) { return (size + kPage - 1) / kPage * kPage; }

}  // namespace

bool is_device(const void* address) {
  const char* byte = static_cast<const char*>(address);
  return front && byte >= front && byte < front + capacity;
}

void* alias(const void* device_address) {
  if (!is_device(device_address)) die("an address of the host where one of the device is needed");
  return back + (static_cast<const char*>(device_address) - front);
}

void* allocate(size_t size) {
  std::lock_guard<std::mutex> lock(mutex);
  open_memory();
  size = rounded(size ? size : 1);
  for (auto hole = holes.begin(); hole != holes.end(); ++hole) {
    if (hole->second < size) continue;
    size_t offset = hole->first, left = hole->second - size;
    holes.erase(hole);
    if (left) holes[offset + size] = left;
    std::memset(back + offset, kNan, size);
    int64_t now = counters.allocated_bytes += static_cast<int64_t>(size);
    if (now > counters.peak_bytes) counters.peak_bytes = now;
    return front + offset;
  }
  return nullptr;
}

void release(void* device_address, size_t size) {
  if (!device_address) return;
  std::lock_guard<std::mutex> lock(mutex);
  size = rounded(size ? size : 1);
  size_t offset = static_cast<char*>(alias(device_address)) - back;
  std::memset(back + offset, kNan, size);  // whoever still reads it gets NaN
  counters.allocated_bytes -= static_cast<int64_t>(size);
  auto next = holes.lower_bound(offset);
  if (next != holes.end() && offset + size == next->first) {
    size += next->second;
    next = holes.erase(next);
  }
  if (next != holes.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += size;
      return;
    }
  }
  holes[offset] = size;
}

namespace {

thread_local int current_device = 0;

size_t device_count() {
  const char* told = std::getenv("SANDBOX_DEVICES");
  return told ? std::strtoull(told, nullptr, 10) : 4;
}

C_Status h2d(const C_Device, void* to, const void* from, size_t size) {
  if (is_device(from)) die("copy host to device: the source lies on the device");
  counters.h2d_calls++, counters.h2d_bytes += static_cast<int64_t>(size);
  std::memcpy(alias(to), from, size);
  return C_SUCCESS;
}

C_Status d2h(const C_Device, void* to, const void* from, size_t size) {
  if (is_device(to)) die("copy device to host: the target lies on the device");
  counters.d2h_calls++, counters.d2h_bytes += static_cast<int64_t>(size);
  std::memcpy(to, alias(from), size);
  return C_SUCCESS;
}

C_Status d2d(const C_Device, void* to, const void* from, size_t size) {
  counters.d2d_calls++, counters.d2d_bytes += static_cast<int64_t>(size);
  std::memmove(alias(to), alias(from), size);
  return C_SUCCESS;
}

C_Status p2p(const C_Device device, const C_Device, void* to, const void* from, size_t size) {
  return d2d(device, to, from, size);
}

template <C_Status (*copy)(const C_Device, void*, const void*, size_t)>
C_Status on_stream(const C_Device device, C_Stream, void* to, const void* from, size_t size) {
  return copy(device, to, from, size);
}

C_Status p2p_on_stream(const C_Device to_device, const C_Device, C_Stream, void* to, const void* from, size_t size) {
  return d2d(to_device, to, from, size);
}

template <size_t value>
C_Status constant(const C_Device, size_t* size) {
  *size = value;
  return C_SUCCESS;
}

C_Status yes(const C_Device, bool* supported) {
  *supported = true;
  return C_SUCCESS;
}

template <class... Arguments>
using Pointer = C_Status (*)(Arguments...);

// Work is done when it is asked for: streams and events exist and are always ready.
template <class Handle>
C_Status make(const C_Device, Handle* handle) {
  *handle = reinterpret_cast<Handle>(new char);
  return C_SUCCESS;
}

template <class Handle>
C_Status drop(const C_Device, Handle handle) {
  delete reinterpret_cast<char*>(handle);
  return C_SUCCESS;
}

// Converts to any function of the table that has nothing to do here.
struct Nothing {
  template <class... Arguments>
  operator Pointer<Arguments...>() const {
    return [](Arguments...) { return C_SUCCESS; };
  }
};

}  // namespace
}  // namespace sandbox

using namespace sandbox;

extern "C" {

Counters* sandbox_counters() { return &counters; }
// For tests: what a stray access of the host does (SIGSEGV), and how fresh memory looks.
int sandbox_is_device(const void* address) { return is_device(address); }

void InitPlugin(CustomRuntimeParams* params) {
  PADDLE_CUSTOM_RUNTIME_CHECK_VERSION(params);
  params->device_type = const_cast<char*>(device_type());
  params->sub_device_type = const_cast<char*>("v1");
  C_DeviceInterface* i = params->interface;
  std::memset(static_cast<void*>(i), 0, sizeof(C_DeviceInterface));
  i->size = sizeof(C_DeviceInterface);

  i->initialize = i->finalize = Nothing();
  i->init_device = i->deinit_device = i->synchronize_device = Nothing();
  i->set_device = [](const C_Device device) { return current_device = device->id, C_SUCCESS; };
  i->get_device = [](const C_Device device) { return device->id = current_device, C_SUCCESS; };
  i->create_stream = make<C_Stream>;
  i->destroy_stream = drop<C_Stream>;
  i->query_stream = i->synchronize_stream = Nothing();
  i->stream_add_callback = [](const C_Device device, C_Stream stream, C_Callback callback, void* data) {
    C_Status status = C_SUCCESS;
    callback(device, stream, data, &status);
    return status;
  };
  i->create_event = make<C_Event>;
  i->destroy_event = drop<C_Event>;
  i->query_event = i->synchronize_event = Nothing();
  i->record_event = i->stream_wait_event = Nothing();

  i->device_memory_allocate = [](const C_Device, void** address, size_t size) {
    *address = allocate(size);
    return *address ? C_SUCCESS : C_FAILED;
  };
  i->device_memory_deallocate = [](const C_Device, void* address, size_t size) {
    release(address, size);
    return C_SUCCESS;
  };
  i->device_memory_set = [](const C_Device, void* address, unsigned char value, size_t size) {
    std::memset(alias(address), value, size);
    return C_SUCCESS;
  };
  i->host_memory_allocate = [](const C_Device, void** address, size_t size) {
    *address = std::malloc(size);
    return *address ? C_SUCCESS : C_FAILED;
  };
  i->host_memory_deallocate = [](const C_Device, void* address, size_t) { return std::free(address), C_SUCCESS; };
  i->memory_copy_h2d = h2d;
  i->memory_copy_d2h = d2h;
  i->memory_copy_d2d = d2d;
  i->memory_copy_p2p = p2p;
  i->async_memory_copy_h2d = on_stream<h2d>;
  i->async_memory_copy_d2h = on_stream<d2h>;
  i->async_memory_copy_d2d = on_stream<d2d>;
  i->async_memory_copy_p2p = p2p_on_stream;

  i->get_device_count = [](size_t* count) { return *count = device_count(), C_SUCCESS; };
  i->get_device_list = [](size_t* devices) {
    for (size_t each = 0; each < device_count(); ++each) devices[each] = each;
    return C_SUCCESS;
  };
  i->device_memory_stats = [](const C_Device, size_t* total, size_t* free) {
    *total = capacity;
    *free = capacity - static_cast<size_t>(counters.allocated_bytes);
    return C_SUCCESS;
  };
  i->device_min_chunk_size = constant<256>;
  i->get_compute_capability = constant<80>;
  i->get_runtime_version = i->get_driver_version = constant<1>;
  i->get_multi_process = constant<1>;
  i->get_max_threads_per_mp = i->get_max_threads_per_block = constant<1024>;
  i->is_float16_supported = i->is_bfloat16_supported = i->is_dnn_supported = yes;

  i->blas_axpby = [](const C_Device, C_Stream, C_DataType dtype, size_t count, float alpha, void* x, float beta,
                     void* y) {
    counters.kernel_calls++;
    axpby(dtype, count, alpha, alias(x), beta, alias(y));
    return C_SUCCESS;
  };
  fill_collectives(i);
  register_kernels();
}
}
