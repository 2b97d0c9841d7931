// The test device's kernels: every CPU kernel of Paddle, run on the plug-in's own view of the device's memory.
//
// A kernel of Paddle is called with its context, inputs, attributes and outputs. Here each CPU kernel is registered for
// the device again behind a forwarder that hands it a CPU context, copies of the input tensors whose memory is the
// usable view of the same pages, and outputs likewise; what it allocated is moved to the device. A half-precision kernel
// that the CPU lacks is the float32 one: inputs are widened, outputs rounded, so that every layer's result has half
// precision, as on a GPU. No copy between host and device is counted for any of this: it is the device's own work.
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "paddle/phi/backends/context_pool.h"
#include "paddle/phi/backends/cpu/cpu_context.h"
#include "paddle/phi/backends/custom/custom_context.h"
#include "paddle/phi/core/custom_kernel.h"
#include "paddle/phi/core/dense_tensor.h"
#include "paddle/phi/core/generator.h"
#include "paddle/phi/core/kernel_context.h"
#include "paddle/phi/core/kernel_factory.h"

namespace sandbox {
namespace {

using phi::DataType;
using phi::DenseTensor;
using Holder = std::shared_ptr<phi::Allocation>;
using Tensors = std::vector<const DenseTensor*>;

enum class Kind { kTensor, kOptional, kVector, kBaseVector, kOptionalVector, kOutput, kOutputVector };

struct Entry {
  std::string name;
  phi::Kernel cpu;
  std::vector<Kind> inputs, outputs;
  size_t integer_attributes = 0;       // those that travel in integer registers or on the stack
  DataType half = DataType::UNDEFINED;  // what a float32 kernel stands in for
  bool leaves_memory = false;           // allocates and writes nothing: the result must look like fresh memory
  bool first_output_half = false;       // of a norm: the others are statistics and stay float32
  std::atomic<int64_t> calls{0};
};
std::vector<std::unique_ptr<Entry>> entries;

Holder& holder(DenseTensor& tensor) { return const_cast<Holder&>(tensor.Holder()); }
phi::DenseTensorMeta& meta(DenseTensor& tensor) { return const_cast<phi::DenseTensorMeta&>(tensor.meta()); }

template <class To, class From>
void convert_as(void* to, const void* from, int64_t count) {
  for (int64_t k = 0; k < count; ++k) static_cast<To*>(to)[k] = static_cast<To>(static_cast<const From*>(from)[k]);
}

void widen(void* to, const void* from, DataType half, int64_t count) {
  if (half == DataType::FLOAT16) convert_as<float, phi::dtype::float16>(to, from, count);
  else convert_as<float, phi::dtype::bfloat16>(to, from, count);
}

void round_off(void* to, const void* from, DataType half, int64_t count) {
  if (half == DataType::FLOAT16) convert_as<phi::dtype::float16, float>(to, from, count);
  else convert_as<phi::dtype::bfloat16, float>(to, from, count);
}

phi::CPUContext* host_context(const phi::CustomContext& device) {
  static std::mutex mutex;
  static std::map<const void*, phi::CPUContext*> contexts;
  std::lock_guard<std::mutex> lock(mutex);
  phi::CPUContext*& context = contexts[&device];
  if (!context) {
    const phi::DeviceContext* cpu = phi::DeviceContextPool::Instance().Get(phi::CPUPlace());
    context = new phi::CPUContext(phi::CPUPlace());  // lives as long as the process
    context->SetAllocator(&cpu->GetAllocator());
    context->SetHostAllocator(&cpu->GetHostAllocator());
    context->SetZeroAllocator(&cpu->GetZeroAllocator());
    context->SetHostZeroAllocator(&cpu->GetHostZeroAllocator());
    context->SetHostGenerator(cpu->GetHostGenerator());
  }
  // Random numbers come from the device's own state, which a process group's context does not have.
  context->SetGenerator(phi::DeviceContextPool::Instance().Get(device.GetPlace())->GetGenerator());
  return context;
}

// One kernel call: lends tensors to the CPU kernel and takes its results back.
class Call {
 public:
  Call(Entry& entry, const phi::CustomContext& device) : entry_(entry), device_(device) {
    counters.kernel_calls++;
    entry.calls++;
  }

  // A shallow copy that a CPU kernel can work on.
  DenseTensor lend(const DenseTensor& tensor, bool narrow = true) {
    check(tensor);
    DenseTensor copy(tensor);
    if (!tensor.Holder() || !is_device(tensor.Holder()->ptr())) {
      if (is_half(tensor) && tensor.initialized() && narrow) use_wide(copy, tensor.data());
      return copy;
    }
    if (is_half(tensor) && narrow) use_wide(copy, alias(tensor.data()));
    else holder(copy) = view(tensor.Holder());
    return copy;
  }

  const DenseTensor* input(const DenseTensor* tensor) {
    if (!tensor) return nullptr;
    lent_.push_back({tensor, std::make_shared<DenseTensor>(lend(*tensor))});
    return lent_.back().copy.get();
  }

  DenseTensor* output(DenseTensor* tensor) {
    if (!tensor) return nullptr;
    check(*tensor);
    for (Lent& each : lent_)
      if (each.tensor == tensor && !is_half(*tensor)) {  // in place: some kernels ask whether it is one and the same
        results_.push_back({tensor, each.copy, false});
        return each.copy.get();
      }
    bool half = is_half(*tensor) && !(entry_.first_output_half && !results_.empty());
    if (entry_.first_output_half && !results_.empty() && is_half(*tensor) && !tensor->initialized())
      meta(*tensor).dtype = DataType::FLOAT32;
    size_t needed = tensor->offset() + static_cast<size_t>(tensor->numel()) * 2;
    bool has_content = tensor->initialized() && (!half || needed <= tensor->Holder()->size());
    DenseTensor copy = has_content ? lend(*tensor) : DenseTensor(*tensor);
    if (!has_content) holder(copy).reset();
    results_.push_back({tensor, std::make_shared<DenseTensor>(copy), half});
    return results_.back().copy.get();
  }

  void finish() {
    for (Result& result : results_) take_back(result);
  }

 private:
  struct Lent {
    const DenseTensor* tensor;
    std::shared_ptr<DenseTensor> copy;
  };
  struct Result {
    DenseTensor* target;
    std::shared_ptr<DenseTensor> copy;
    bool half;
  };
  struct Wide {
    const void* origin;
    Holder device, wide;
    size_t offset;
  };

  void check(const DenseTensor& tensor) const {
    static const DenseTensor sample;
    if (*reinterpret_cast<void* const*>(&tensor) != *reinterpret_cast<void* const*>(&sample))
      die("an argument is not where it should be in kernel", entry_.name.c_str());
  }

  bool is_half(const DenseTensor& tensor) const {
    return entry_.half != DataType::UNDEFINED && tensor.dtype() == entry_.half;
  }

  Holder view(const Holder& device) {
    for (auto& pair : views_)
      if (pair.first == device) return pair.second;
    views_.emplace_back(device, std::make_shared<phi::Allocation>(alias(device->ptr()), device->size(), phi::CPUPlace()));
    return views_.back().second;
  }

  void use_wide(DenseTensor& copy, const void* origin) {
    if (!copy.meta().is_contiguous()) die("a tensor that is not contiguous in half-precision kernel", entry_.name.c_str());
    Holder wide;
    for (Wide& each : wides_)
      if (each.origin == origin && each.wide->size() >= static_cast<size_t>(copy.numel()) * 4) wide = each.wide;
    if (!wide) {
      size_t bytes = static_cast<size_t>(copy.numel()) * 4;
      auto destroy = [](phi::Allocation* allocation) { delete[] static_cast<char*>(allocation->ptr()); };
      wide = std::make_shared<phi::Allocation>(new char[bytes ? bytes : 1], bytes, destroy, phi::CPUPlace());
      widen(wide->ptr(), origin, entry_.half, copy.numel());
      wides_.push_back({origin, copy.Holder(), wide, copy.offset()});
    }
    holder(copy) = wide;
    meta(copy).dtype = DataType::FLOAT32;
    meta(copy).offset = 0;
  }

  void take_back(Result& result) {
    DenseTensor &target = *result.target, &copy = *result.copy;
    const Holder& given = copy.Holder();
    bool round = result.half && copy.dtype() == DataType::FLOAT32;
    if (given) {
      for (auto& pair : views_)
        if (pair.second == given) {  // written in place, or a view of an input
          meta(target) = copy.meta();
          holder(target) = pair.first;
          return;
        }
      for (Wide& each : wides_)
        if (each.wide == given && is_device(each.device->ptr())) {
          meta(target) = copy.meta();
          meta(target).dtype = entry_.half;
          meta(target).offset = each.offset;
          holder(target) = each.device;
          round_off(alias(target.data()), static_cast<char*>(given->ptr()) + copy.offset(), entry_.half, copy.numel());
          return;
        }
    }
    meta(target) = copy.meta();
    holder(target).reset();
    if (!given || !given->ptr()) return;
    DataType dtype = round ? entry_.half : copy.dtype();
    meta(target).dtype = dtype;
    meta(target).offset = 0;
    size_t bytes = static_cast<size_t>(copy.numel()) * phi::SizeOf(dtype);
    void* place = device_.Alloc(&target, dtype, bytes);
    if (!bytes) return;
    const char* source = static_cast<char*>(given->ptr()) + copy.offset();
    if (entry_.leaves_memory) std::memset(alias(place), 0xff, bytes);
    else if (round) round_off(alias(place), source, dtype, copy.numel());
    else std::memcpy(alias(place), source, bytes);
  }

  Entry& entry_;
  const phi::CustomContext& device_;
  std::vector<Lent> lent_;
  std::vector<Result> results_;
  std::vector<std::pair<Holder, Holder>> views_;
  std::vector<Wide> wides_;
};

// ---------------------------------------------------------------- calls with typed arguments (eager mode)
//
// By the calling convention of x86-64 Linux the first six integer or pointer arguments come in registers, the first
// eight floating-point ones in others, and more integers lie on the stack in order. ``sandbox_enter`` (below) writes the
// registers down for ``run``; a function that takes all of them and a struct by value, which is passed on the stack
// itself, forwards any kernel's arguments.

struct Stack {
  uint64_t word[26];
};
using U = uint64_t;
using D = double;
using Any = void (*)(U, U, U, U, U, U, D, D, D, D, D, D, D, D, Stack);

struct Registers {
  U integer[6];
  D real[8];
};
struct Arguments : Registers {
  Stack stack;
  U& at(size_t k) { return k < 6 ? integer[k] : stack.word[k - 6]; }
};

template <class T>
T* pointer(U word) {
  return reinterpret_cast<T*>(word);
}

void run(Entry& entry, Arguments& arguments) {
  const auto& device = *pointer<const phi::CustomContext>(arguments.at(0));
  Call call(entry, device);
  std::vector<std::unique_ptr<Tensors>> vectors;
  std::vector<std::unique_ptr<std::vector<DenseTensor*>>> output_vectors;
  std::vector<std::unique_ptr<paddle::optional<DenseTensor>>> optionals;
  std::vector<std::unique_ptr<paddle::optional<Tensors>>> optional_vectors;
  auto lend_all = [&](const Tensors& tensors) {
    Tensors lent;
    for (const DenseTensor* tensor : tensors) lent.push_back(call.input(tensor));
    return lent;
  };
  auto word_of = [](auto* object) { return reinterpret_cast<U>(object); };
  size_t k = 0;
  arguments.at(k++) = word_of(host_context(device));
  for (Kind kind : entry.inputs) {
    U& word = arguments.at(k++);
    switch (kind) {
      case Kind::kTensor: word = word_of(call.input(pointer<DenseTensor>(word))); break;
      case Kind::kVector: case Kind::kBaseVector:  // both are vectors of pointers to tensors
        vectors.push_back(std::make_unique<Tensors>(lend_all(*pointer<Tensors>(word))));
        word = word_of(vectors.back().get());
        break;
      case Kind::kOptional: {
        auto& given = *pointer<paddle::optional<DenseTensor>>(word);
        if (!given) break;
        optionals.push_back(std::make_unique<paddle::optional<DenseTensor>>(*call.input(given.get_ptr())));
        word = word_of(optionals.back().get());
        break;
      }
      case Kind::kOptionalVector: {
        auto& given = *pointer<paddle::optional<Tensors>>(word);
        if (!given) break;
        optional_vectors.push_back(std::make_unique<paddle::optional<Tensors>>(lend_all(*given)));
        word = word_of(optional_vectors.back().get());
        break;
      }
      default: die("an output among the inputs of kernel", entry.name.c_str());
    }
  }
  k += entry.integer_attributes;
  for (Kind kind : entry.outputs) {
    U& word = arguments.at(k++);
    if (kind == Kind::kOutput) {
      word = word_of(call.output(pointer<DenseTensor>(word)));
    } else {
      output_vectors.push_back(std::make_unique<std::vector<DenseTensor*>>());
      for (DenseTensor* tensor : *pointer<std::vector<DenseTensor*>>(word))
        output_vectors.back()->push_back(call.output(tensor));
      word = word_of(output_vectors.back().get());
    }
  }
  const U* i = arguments.integer;
  const D* r = arguments.real;
  entry.cpu.GetVariadicKernelFn<Any>()(i[0], i[1], i[2], i[3], i[4], i[5], r[0], r[1], r[2], r[3], r[4], r[5], r[6],
                                       r[7], arguments.stack);
  call.finish();
}

// ---------------------------------------------------------------- calls with a KernelContext (compiled programs)

void run_context(Entry& entry, phi::KernelContext* context) {
  auto& device = const_cast<phi::CustomContext&>(context->GetDeviceContext<phi::CustomContext>());
  Call call(entry, device);
  phi::KernelContext lent(*context);
  lent.SetDeviceContext(host_context(device));
  for (size_t k = 0; k < context->InputsSize(); ++k)
    if (const auto* tensor = static_cast<const DenseTensor*>(context->MutableInputAt(k)))
      lent.UpdataInput(k, call.input(tensor));
  // Outputs cannot be replaced in a context, so the tensors themselves are lent and put right afterwards.
  std::vector<std::pair<DenseTensor*, DenseTensor*>> outputs;
  for (size_t k = 0; k < context->OutputsSize(); ++k) {
    auto* target = static_cast<DenseTensor*>(context->MutableOutputAt(k));
    if (!target) continue;
    outputs.emplace_back(target, call.output(target));
  }
  auto exchange = [&] {
    for (auto& [target, copy] : outputs) {
      std::swap(holder(*target), holder(*copy));
      std::swap(meta(*target), meta(*copy));
    }
  };
  exchange();
  try {
    entry.cpu(&lent);
  } catch (...) {
    exchange();
    throw;
  }
  exchange();
  call.finish();
}

// ---------------------------------------------------------------- forwarders: a few instructions for each kernel

extern "C" void sandbox_enter();
extern "C" __attribute__((used, visibility("hidden"))) void sandbox_run(Entry* entry, const Registers* registers,
                                                                        const Stack* stack) {
  Arguments arguments{*registers, *stack};
  run(*entry, arguments);
}

asm(R"(
  .text
  .hidden sandbox_enter
  .globl sandbox_enter
  .type sandbox_enter, @function
sandbox_enter:
  .cfi_startproc
  push %rbp
  .cfi_def_cfa_offset 16
  .cfi_offset %rbp, -16
  mov %rsp, %rbp
  .cfi_def_cfa_register %rbp
  sub $112, %rsp
  mov %rdi, 0(%rsp)
  mov %rsi, 8(%rsp)
  mov %rdx, 16(%rsp)
  mov %rcx, 24(%rsp)
  mov %r8, 32(%rsp)
  mov %r9, 40(%rsp)
  movsd %xmm0, 48(%rsp)
  movsd %xmm1, 56(%rsp)
  movsd %xmm2, 64(%rsp)
  movsd %xmm3, 72(%rsp)
  movsd %xmm4, 80(%rsp)
  movsd %xmm5, 88(%rsp)
  movsd %xmm6, 96(%rsp)
  movsd %xmm7, 104(%rsp)
  mov %r10, %rdi
  mov %rsp, %rsi
  lea 16(%rbp), %rdx
  call sandbox_run
  leave
  .cfi_def_cfa %rsp, 8
  ret
  .cfi_endproc
  .size sandbox_enter, .-sandbox_enter
)");

// Writes "move the entry's address to a register; jump" into memory that becomes executable.
class Forwarders {
 public:
  explicit Forwarders(size_t most) : size_(most * kStub) {
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) die("no memory for the forwarders");
    start_ = next_ = static_cast<unsigned char*>(memory);
  }

  void* write(const Entry* entry) {
    unsigned char* stub = next_;
    next_ += kStub;
    void (*target)() = &sandbox_enter;
    std::memcpy(stub, "\x49\xba", 2);  // mov r10, entry: no argument comes in r10
    std::memcpy(stub + 2, &entry, 8);
    std::memcpy(stub + 10, "\x48\xb8", 2);  // mov rax, target
    std::memcpy(stub + 12, &target, 8);
    std::memcpy(stub + 20, "\xff\xe0", 2);  // jmp rax
    return stub;
  }

  void seal() {
    if (mprotect(start_, size_, PROT_READ | PROT_EXEC) != 0) die("the forwarders cannot be made executable");
  }

 private:
  static constexpr size_t kStub = 32;

  size_t size_;
  unsigned char *start_, *next_;
};

// ---------------------------------------------------------------- registration

bool known(DataType dtype) {
  switch (dtype) {
    case DataType::BOOL: case DataType::UINT8: case DataType::INT32: case DataType::INT64: case DataType::FLOAT16:
    case DataType::BFLOAT16: case DataType::FLOAT32: case DataType::FLOAT64: return true;
    default: return false;
  }
}

bool is_norm(const std::string& name) {
  return name.find("batch_norm") != std::string::npos || name.find("layer_norm") != std::string::npos;
}

// Whether the kernel takes and gives dense tensors alone; fills what is known of its arguments.
bool describe(const phi::Kernel& kernel, Entry* entry) {
  const phi::KernelArgsDef& args = kernel.args_def();
  for (const auto& each : args.input_defs()) {
    if (each.type_index == typeid(DenseTensor)) entry->inputs.push_back(Kind::kTensor);
    else if (each.type_index == typeid(paddle::optional<DenseTensor>)) entry->inputs.push_back(Kind::kOptional);
    else if (each.type_index == typeid(Tensors)) entry->inputs.push_back(Kind::kVector);
    else if (each.type_index == typeid(std::vector<const phi::TensorBase*>)) entry->inputs.push_back(Kind::kBaseVector);
    else if (each.type_index == typeid(paddle::optional<Tensors>)) entry->inputs.push_back(Kind::kOptionalVector);
    else return false;
  }
  for (const auto& each : args.output_defs()) {
    if (each.type_index == typeid(DenseTensor*)) entry->outputs.push_back(Kind::kOutput);
    else if (each.type_index == typeid(std::vector<DenseTensor*>)) entry->outputs.push_back(Kind::kOutputVector);
    else return false;
  }
  for (const auto& each : args.attribute_defs())
    entry->integer_attributes +=
        each.type_index != phi::AttributeType::FLOAT32 && each.type_index != phi::AttributeType::FLOAT64;
  return kernel.IsValid() && 1 + entry->inputs.size() + entry->integer_attributes + entry->outputs.size() < 32;
}

}  // namespace

void register_kernels() {
  const phi::Backend backend = paddle::experimental::StringToBackend(device_type());
  constexpr size_t kMost = 16384;
  Forwarders forwarders(kMost);
  auto adopt = [&](const std::string& name, const phi::Kernel& cpu, phi::DataLayout layout, DataType dtype, bool half) {
    auto entry = std::make_unique<Entry>();
    if (!describe(cpu, entry.get())) return;
    entry->name = name;
    entry->cpu = cpu;
    entry->half = half ? dtype : DataType::UNDEFINED;
    entry->leaves_memory = name == "empty" || name == "empty_like";
    entry->first_output_half = half && is_norm(name);
    if (entries.size() == kMost) die("more kernels than forwarders; raise kMost in kernels.cc");
    phi::KernelFn in_context = [called = entry.get()](phi::KernelContext* context) { run_context(*called, context); };
    phi::Kernel kernel(in_context, forwarders.write(entry.get()));
    *kernel.mutable_args_def() = cpu.args_def();
    auto move = [&](phi::TensorArgDef& each) {
      if (each.backend == phi::Backend::CPU) each.backend = backend;
      if (half && each.dtype == DataType::FLOAT32) each.dtype = dtype;
    };
    for (auto& each : kernel.mutable_args_def()->input_defs()) move(each);
    for (auto& each : kernel.mutable_args_def()->output_defs()) move(each);
    if (entry->first_output_half) {
      auto& inputs = kernel.mutable_args_def()->input_defs();
      for (size_t k = 1; k < inputs.size(); ++k) inputs[k].dtype = DataType::UNDEFINED;
    }
    entries.push_back(std::move(entry));
    phi::CustomKernelMap::Instance().RegisterCustomKernel(name, phi::KernelKey(backend, layout, dtype), kernel);
  };
  for (auto& [name, keys] : phi::KernelFactory::Instance().kernels()) {
    auto find = [&keys = keys](phi::Backend from, phi::DataLayout layout, DataType dtype) -> const phi::Kernel* {
      auto found = keys.find(phi::KernelKey(from, layout, dtype));
      return found == keys.end() ? nullptr : &found->second;
    };
    for (auto& [key, kernel] : keys) {
      if (key.backend() != phi::Backend::CPU || !known(key.dtype())) continue;
      bool strided = key.layout() == phi::DataLayout::STRIDED;
      // Paddle's own kernels for plug-in devices move data and talk to other ranks; those of views only look.
      bool theirs = find(phi::Backend::CUSTOM, key.layout(), key.dtype()) != nullptr;
      if (theirs && !strided && name.rfind("empty", 0) != 0) continue;
      adopt(name, kernel, key.layout(), key.dtype(), false);
      if (strided || key.dtype() != DataType::FLOAT32) continue;
      for (DataType half : {DataType::FLOAT16, DataType::BFLOAT16})
        if (!find(phi::Backend::CPU, key.layout(), half)) adopt(name, kernel, key.layout(), half, true);
    }
  }
  forwarders.seal();
  register_norms();
  phi::CustomKernelMap::Instance().RegisterCustomKernels();
}

}  // namespace sandbox

extern "C" {

// How often a kernel was called since the start, over all its types; -1 if there is none of the name.
int64_t sandbox_kernel_calls(const char* name) {
  int64_t calls = -1;
  for (auto& entry : sandbox::entries)
    if (entry->name == name) calls = (calls < 0 ? 0 : calls) + entry->calls;
  return calls;
}

// "name count\n" of every kernel called so far, cut to the buffer.
size_t sandbox_kernels(char* buffer, size_t size) {
  std::map<std::string, int64_t> calls;
  for (auto& entry : sandbox::entries)
    if (entry->calls) calls[entry->name] += entry->calls;
  std::string text;
  for (auto& [name, count] : calls) text += name + " " + std::to_string(count) + "\n";
  std::strncpy(buffer, text.c_str(), size - 1);
  buffer[size - 1] = 0;
  return text.size();
}
}
