// Batch norm over the batches of all ranks, which Paddle has for GPUs alone: registered through Paddle's C interface.
#include <string>
#include <vector>

#include "device.h"
#include "paddle/phi/capi/all.h"

namespace {

// Where a value of channel c of image n at place k lies.
struct Layout {
  int64_t images, channels, places;
  bool last;  // channels last

  Layout(const phi::DenseTensor& x, const std::string& name) : last(name == "NHWC") {
    std::vector<int64_t> dims = x.dims();
    images = dims[0], channels = dims[last ? dims.size() - 1 : 1];
    places = images > 0 && channels > 0 ? x.numel() / (images * channels) : 0;
  }
  int64_t at(int64_t n, int64_t c, int64_t k) const {
    return last ? (n * places + k) * channels + c : (n * channels + c) * places + k;
  }
  template <class Visit>
  void each(Visit visit) const {
    for (int64_t n = 0; n < images; ++n)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < places; ++k) visit(c, at(n, c, k));
  }
};

template <class T>
T* host(const phi::DenseTensor& tensor) {
  return static_cast<T*>(sandbox::alias(tensor.data<T>()));
}

template <class T>
T* result(const phi::Context& context, phi::DenseTensor* tensor) {
  return static_cast<T*>(sandbox::alias(context.template Alloc<T>(tensor)));
}

// ``x`` as double, and per channel: sums of two values over all ranks, then their number.
template <class Pair>
std::vector<double> sums_of(const Layout& layout, Pair pair) {
  std::vector<double> sums(2 * layout.channels + 1, 0.0);
  layout.each([&](int64_t c, int64_t at) {
    auto [one, two] = pair(c, at);
    sums[2 * c] += one, sums[2 * c + 1] += two;
  });
  sums.back() = static_cast<double>(layout.images * layout.places);
  sandbox::world_sum(sums.data(), sums.size());
  return sums;
}

}  // namespace

template <typename T>
void SyncBatchNorm(const phi::Context& context, const phi::DenseTensor& x, const phi::DenseTensor& mean,
                   const phi::DenseTensor& variance, const phi::DenseTensor& scale, const phi::DenseTensor& bias,
                   bool is_test, float momentum, float epsilon, const std::string& layout_name, bool, bool,
                   phi::DenseTensor* y, phi::DenseTensor* mean_out, phi::DenseTensor* variance_out,
                   phi::DenseTensor* saved_mean, phi::DenseTensor* saved_variance, phi::DenseTensor*) {
  sandbox::counters.kernel_calls++;
  Layout layout(x, layout_name);
  const T* from = host<T>(x);
  const float *gamma = host<float>(scale), *beta = host<float>(bias);
  std::vector<float> running_mean(host<float>(mean), host<float>(mean) + layout.channels);
  std::vector<float> running_variance(host<float>(variance), host<float>(variance) + layout.channels);
  T* to = result<T>(context, y);
  float *new_mean = result<float>(context, mean_out), *new_variance = result<float>(context, variance_out);
  float *kept_mean = result<float>(context, saved_mean), *kept_inverse = result<float>(context, saved_variance);
  std::vector<double> sums;
  if (!is_test)
    sums = sums_of(layout, [&](int64_t, int64_t at) {
      double value = static_cast<double>(static_cast<float>(from[at]));
      return std::pair<double, double>(value, value * value);
    });
  for (int64_t c = 0; c < layout.channels; ++c) {
    double center = running_mean[c], spread = running_variance[c];
    if (!is_test) center = sums[2 * c] / sums.back(), spread = sums[2 * c + 1] / sums.back() - center * center;
    kept_mean[c] = static_cast<float>(center);
    kept_inverse[c] = static_cast<float>(1.0 / std::sqrt(spread + epsilon));
    double old = is_test ? 1.0 : momentum;
    new_mean[c] = static_cast<float>(old * running_mean[c] + (1 - old) * center);
    new_variance[c] = static_cast<float>(old * running_variance[c] + (1 - old) * spread);
  }
  layout.each([&](int64_t c, int64_t at) {
    float normal = (static_cast<float>(from[at]) - kept_mean[c]) * kept_inverse[c];
    to[at] = static_cast<T>(normal * gamma[c] + beta[c]);
  });
}

template <typename T>
void SyncBatchNormGrad(const phi::Context& context, const phi::DenseTensor& x, const phi::DenseTensor& scale,
                       const phi::DenseTensor&, const phi::DenseTensor& saved_mean,
                       const phi::DenseTensor& saved_variance, const paddle::optional<phi::DenseTensor>&,
                       const phi::DenseTensor& y_grad, float, float, const std::string& layout_name, bool, bool, bool,
                       phi::DenseTensor* x_grad, phi::DenseTensor* scale_grad, phi::DenseTensor* bias_grad) {
  sandbox::counters.kernel_calls++;
  Layout layout(x, layout_name);
  const T *from = host<T>(x), *upstream = host<T>(y_grad);
  const float *gamma = host<float>(scale), *mean = host<float>(saved_mean), *inverse = host<float>(saved_variance);
  auto normal = [&](int64_t c, int64_t at) {
    return (static_cast<double>(static_cast<float>(from[at])) - mean[c]) * inverse[c];
  };
  auto slope = [&](int64_t at) { return static_cast<double>(static_cast<float>(upstream[at])); };
  std::vector<double> own(2 * layout.channels, 0.0);  // scale and bias take this rank's share: gradients are averaged
  std::vector<double> sums = sums_of(layout, [&](int64_t c, int64_t at) {
    std::pair<double, double> both(slope(at) * normal(c, at), slope(at));
    own[2 * c] += both.first, own[2 * c + 1] += both.second;
    return both;
  });
  T* to = result<T>(context, x_grad);
  layout.each([&](int64_t c, int64_t at) {
    double middle = (sums[2 * c + 1] + normal(c, at) * sums[2 * c]) / sums.back();
    to[at] = static_cast<T>(static_cast<float>(gamma[c] * inverse[c] * (slope(at) - middle)));
  });
  float* d_gamma = scale_grad ? result<float>(context, scale_grad) : nullptr;
  float* d_beta = bias_grad ? result<float>(context, bias_grad) : nullptr;
  for (int64_t c = 0; c < layout.channels; ++c) {
    if (d_gamma) d_gamma[c] = static_cast<float>(own[2 * c]);
    if (d_beta) d_beta[c] = static_cast<float>(own[2 * c + 1]);
  }
}

namespace {

// What Paddle's PD_BUILD_PHI_KERNEL does, for a device type that is known at run time only.
template <typename T, typename Function>
void add(const char* name, Function function, void (*in_context)(PD_KernelContext*), void* typed) {
  phi::capi::CustomKernelArgsParseFunctor<Function> arguments;
  PD_RegisterPhiKernel(name, sandbox::device_type(), phi::capi::CppTypeToPDType<T>::Type(), PD_DATALAYOUT(ALL_LAYOUT),
                       arguments.in_args_type.size(), arguments.in_args_type.data(), arguments.attr_args_type.size(),
                       arguments.attr_args_type.data(), arguments.out_args_type.size(), arguments.out_args_type.data(),
                       [](const PD_KernelKey*, PD_Kernel*) {}, in_context, typed);
}

template <typename T>
void add_both() {
  add<T>("sync_batch_norm", &SyncBatchNorm<T>, CUSTOM_PHI_KERNEL(SyncBatchNorm<T>),
         CUSTOM_PHI_VARIADIC_KERNEL(SyncBatchNorm<T>));
  add<T>("sync_batch_norm_grad", &SyncBatchNormGrad<T>, CUSTOM_PHI_KERNEL(SyncBatchNormGrad<T>),
         CUSTOM_PHI_VARIADIC_KERNEL(SyncBatchNormGrad<T>));
}

}  // namespace

void sandbox::register_norms() {
  add_both<float>();
  add_both<phi::dtype::float16>();
  add_both<phi::dtype::bfloat16>();
}
