// From tensors' sizes to launches. Nothing here knows PyTorch; errors come back as text, empty where there is none.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "params.h"

namespace smpconv {

// The runtime in this binary is not that of PyTorch: it is told the device, too.
std::string use_device(int device);

// Sizes and pointers of `p` are set; geometry is chosen here.
std::string launch_forward(Scalar scalar, ForwardParams p, cudaStream_t stream);

// Parts of the batch and the map that are summed by themselves: rows of `partial`, (parts, C, Kh, Kw) in float32.
int64_t weight_parts(const WeightParams& p);
std::string launch_weight(Scalar scalar, WeightParams p, void* out, cudaStream_t stream);

}  // namespace smpconv
