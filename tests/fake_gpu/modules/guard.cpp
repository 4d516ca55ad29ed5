// A CUDA device for a torch that was built without CUDA: 8 devices whose streams and events do
// nothing. It computes nothing either; tensors "on" it are FakeTensors (fake_gpu.py).
//
// What torch needs of a device type besides kernels are two singletons, which libtorch_cuda would
// register: the device guard, which autograd's engine, FSDP2 and every `.device` switch ask, and
// the hooks, which say that there is an accelerator at all. Both must be registered before `import
// torch` asks for them, so this library is loaded first (server.py).

#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex num_devices = 8;
constexpr c10::DeviceType cuda = c10::DeviceType::CUDA;
thread_local c10::DeviceIndex current = 0;

// Makes `index` current, unless it is -1; returns the device that was.
c10::DeviceIndex exchange(c10::DeviceIndex index) {
  const c10::DeviceIndex before = current;
  current = index < 0 ? before : index;
  return before;
}

c10::Stream default_stream(c10::Device device) {
  return c10::Stream(c10::Stream::DEFAULT, device);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  // Read by the macro that registers the guard.
  static constexpr c10::DeviceType static_type = cuda;

  c10::DeviceType type() const override { return cuda; }
  c10::DeviceIndex deviceCount() const noexcept override { return num_devices; }
  c10::Device getDevice() const override { return {cuda, current}; }
  void setDevice(c10::Device device) const override { exchange(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { exchange(device.index()); }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {cuda, exchange(device.index())};
  }

  c10::Stream getStream(c10::Device device) const override { return default_stream(device); }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return default_stream(device);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return default_stream(device);
  }
  c10::Stream exchangeStream(c10::Stream) const override { return default_stream(getDevice()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}

  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {

// The name is the key under which torch looks the hooks up.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  DeviceIndex deviceCount() const override { return num_devices; }
  int getNumGPUs() const override { return num_devices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { exchange(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return exchange(device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchange(device); }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
