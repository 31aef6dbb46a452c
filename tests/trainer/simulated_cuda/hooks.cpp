// What a CPU build of torch lacks of CUDA for its fake tensors to live on a device "cuda": the hooks that say what the
// device can do, and a guard that makes it the current one. One device, cuDNN 9, no kernels and no memory.
//
// Nothing is marked `override`: a function that a version of torch does not know is then one that it does not call.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const {}
  bool hasCUDA() const { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const { return false; }
  c10::DeviceIndex deviceCount() const { return 1; }
  int getNumGPUs() const { return 1; }
  c10::DeviceIndex current_device() const { return 0; }
  c10::DeviceIndex getCurrentDevice() const { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const { return 0; }
  // The layout of a convolution's result depends on what cuDNN can do.
  bool hasCuDNN() const { return true; }
  bool compiledWithCuDNN() const { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const { return true; }
  double batchnormMinEpsilonCuDNN() const { return 0.0; }
  long versionCuDNN() const { return 91000; }
  long versionRuntimeCuDNN() const { return 91000; }
};

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const { return kDevice; }
  c10::DeviceIndex deviceCount() const noexcept { return 1; }
  c10::Stream getStream(c10::Device) const noexcept { return kStream; }
  c10::Stream getDefaultStream(c10::Device) const { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept { return kStream; }
  bool queryStream(const c10::Stream&) const { return true; }
  void synchronizeStream(const c10::Stream&) const {}
  // The backward pass orders its threads by events.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const {}
  void block(void*, const c10::Stream&) const {}
  bool queryEvent(void*) const { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept {}
};

c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());

}  // namespace

using at::CUDAHooksRegistry;
namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::Hooks)
}
