// The library operators on CUDA. Through LibTorch's stable ABI: one binary serves every PyTorch from 2.10 on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

#include "launch.h"

// The library of PyTorch's that the operators are registered in; another one where the operator is installed alone.
#ifndef SMPCONV_LIBRARY
#define SMPCONV_LIBRARY smpconv
#endif

namespace smpconv {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Scalar scalar_of(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "expected bfloat16 or float16");
  return type == ScalarType::BFloat16 ? Scalar::bfloat16 : Scalar::float16;
}

void check_same(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index(),
                  "both tensors have to be on one CUDA device");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "both tensors have to be of one dtype");
  STD_TORCH_CHECK(a.dim() == 4 && b.dim() == 4, "both tensors have to have four axes");
}

// The device of a tensor is the current one for both runtimes until the guard ends.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    const std::string error = use_device(tensor.get_device_index());
    STD_TORCH_CHECK(error.empty(), "depthwise convolution: ", error.c_str());
  }

 private:
  const torch::stable::accelerator::DeviceGuard guard_;
};

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  const auto status = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "PyTorch gave no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

int small(int64_t size) {
  STD_TORCH_CHECK(size < (int64_t{1} << 30), "a size is too large: ", size);
  return static_cast<int>(size);
}

// Elements that one copy can move: all rows of all planes have to start at a multiple of its size.
int vector_of(std::initializer_list<const void*> pointers, int64_t width) {
  for (int vector = 8; vector > 1; vector /= 2) {
    bool fits = width % vector == 0;
    for (const void* pointer : pointers) {
      fits = fits && reinterpret_cast<uintptr_t>(pointer) % (2 * vector) == 0;
    }
    if (fits) {
      return vector;
    }
  }
  return 1;
}

void set_sizes(Geometry& g, const Tensor& x, int64_t kernel_height, int64_t kernel_width) {
  g.images = x.size(0);
  g.channels = small(x.size(1));
  g.height = small(x.size(2));
  g.width = small(x.size(3));
  g.kernel_height = small(kernel_height);
  g.kernel_width = small(kernel_width);
  STD_TORCH_CHECK(kernel_height % 2 == 1 && kernel_width % 2 == 1 && kernel_height <= 63 && kernel_width <= 63,
                  "kernel sizes have to be odd and at most 63");
}

Tensor convolve(const Tensor& given_x, const Tensor& given_weight, bool flip) {
  check_same(given_x, given_weight);
  const OnDeviceOf guard(given_x);
  const Tensor x = torch::stable::contiguous(given_x), weight = torch::stable::contiguous(given_weight);
  STD_TORCH_CHECK(weight.size(0) == x.size(1) && weight.size(1) == 1, "weight has to be (C, 1, Kh, Kw)");
  ForwardParams p{};
  set_sizes(p, x, weight.size(2), weight.size(3));
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) {
    return y;
  }
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.vector = vector_of({p.x, p.y}, p.width);
  p.flip = flip;
  const std::string error = launch_forward(scalar_of(x), p, current_stream(x));
  STD_TORCH_CHECK(error.empty(), "depthwise convolution: ", error.c_str());
  return y;
}

Tensor depthwise_conv2d_forward(const Tensor& x, const Tensor& weight) { return convolve(x, weight, false); }

Tensor depthwise_conv2d_input(const Tensor& grad, const Tensor& weight) { return convolve(grad, weight, true); }

Tensor depthwise_conv2d_weight(const Tensor& given_grad, const Tensor& given_x, int64_t kernel_height,
                               int64_t kernel_width) {
  check_same(given_grad, given_x);
  const OnDeviceOf guard(given_x);
  const Tensor grad = torch::stable::contiguous(given_grad), x = torch::stable::contiguous(given_x);
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(grad.size(dim) == x.size(dim), "the gradient has to have the shape of x");
  }
  WeightParams p{};
  set_sizes(p, x, kernel_height, kernel_width);
  Tensor out = torch::stable::new_empty(x, {x.size(1), 1, kernel_height, kernel_width});
  if (x.numel() == 0) {
    torch::stable::zero_(out);
    return out;
  }
  const int64_t parts = weight_parts(p);
  STD_TORCH_CHECK(parts > 0, "depthwise convolution: the kernel and its rows of the map need too much shared memory");
  Tensor partial = torch::stable::new_empty(x, {parts, x.size(1), kernel_height, kernel_width}, ScalarType::Float);
  p.grad = grad.const_data_ptr();
  p.x = x.const_data_ptr();
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  p.vector = vector_of({p.grad, p.x}, p.width);
  const std::string error = launch_weight(scalar_of(x), p, out.mutable_data_ptr(), current_stream(x));
  STD_TORCH_CHECK(error.empty(), "depthwise convolution: ", error.c_str());
  return out;
}

}  // namespace
}  // namespace smpconv

// Schemas, shapes and derivatives are registered from Python, which needs them without this binary, too.
STABLE_TORCH_LIBRARY_IMPL(SMPCONV_LIBRARY, CUDA, m) {
  m.impl("depthwise_conv2d_forward", TORCH_BOX(&smpconv::depthwise_conv2d_forward));
  m.impl("depthwise_conv2d_input", TORCH_BOX(&smpconv::depthwise_conv2d_input));
  m.impl("depthwise_conv2d_weight", TORCH_BOX(&smpconv::depthwise_conv2d_weight));
}
