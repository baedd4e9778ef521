// What makes a CPU build of torch accept CUDA tensors that have no memory (fake tensors), autograd included.
//
// Two things are registered before torch's own: a device guard that knows one device with one stream and does nothing, and
// hooks that say that the device is there, so that autograd's engine starts a thread for it. Nothing computes: there are no
// kernels, no memory and no allocator. Built by build.py, loaded before torch is imported (torch looks for them once).
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceType kind = c10::DeviceType::CUDA;

struct OneDevice final : c10::impl::NoOpDeviceGuardImpl<kind> {
  c10::Device exchangeDevice(c10::Device) const override { return {kind, 0}; }
  c10::Device getDevice() const override { return {kind, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, c10::Device(kind, 0)); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream({kind, 0}); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

const c10::impl::DeviceGuardImplRegistrar guard(kind, new OneDevice());

}  // namespace

namespace lopt_edge_tests {

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  bool isPinnedPtr(const void*) const override { return false; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
using CUDAHooks = Hooks;  // the name under which torch asks for them
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace lopt_edge_tests
