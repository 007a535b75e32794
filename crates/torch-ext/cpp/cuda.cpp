// libtorch's CUDA half and the driver, found at run time: nothing of CUDA is needed to compile, link or start.
#include "cuda.h"
#include "shim.h"

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <torch/headeronly/version.h>

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <mutex>
#include <string>

extern "C" uint64_t aoti_torch_abi_version();  // of the libtorch_cpu.so that is loaded

namespace {

namespace fs = std::filesystem;

constexpr const char* kLibrary = "libtorch_cuda.so";

// The file that holds a function of libtorch_cpu.so, links resolved.
fs::path libtorch_cpu() {
  Dl_info info;
  auto* inside = reinterpret_cast<void*>(&at::detail::getCUDAHooks);
  TORCH_CHECK(dladdr(inside, &info) != 0 && info.dli_fname, "dladdr does not know where libtorch_cpu.so lies");
  std::error_code error;
  fs::path file = fs::canonical(info.dli_fname, error);
  return error ? fs::path(info.dli_fname) : file;
}

std::string version_of(uint64_t abi) {
  return c10::str((abi >> 56) & 0xff, ".", (abi >> 48) & 0xff, ".", (abi >> 40) & 0xff);
}

const char* dl_message() {
  const char* message = dlerror();
  return message ? message : "no reason given";
}

// The driver's functions, declared as in NVIDIA's documentation of its driver API.
struct Driver {
  int (*init)(unsigned flags);
  int (*get_error_name)(int error, const char** name);
  int (*device_count)(int* count);
  int (*device)(int* device, int ordinal);
  int (*name)(char* name, int length, int device);
  int (*total_memory)(size_t* bytes, int device);
  int (*pci_bus_id)(char* id, int length, int device);
  int (*attribute)(int* value, int attribute, int device);

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    TORCH_CHECK(library, "no NVIDIA driver on this machine: ", dl_message());
    load(library, "cuInit", init);
    load(library, "cuGetErrorName", get_error_name);
    load(library, "cuDeviceGetCount", device_count);
    load(library, "cuDeviceGet", device);
    load(library, "cuDeviceGetName", name);
    load(library, "cuDeviceTotalMem_v2", total_memory);
    load(library, "cuDeviceGetPCIBusId", pci_bus_id);
    load(library, "cuDeviceGetAttribute", attribute);
    check(init(0), "cuInit");
  }

  template <class F>
  static void load(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    TORCH_CHECK(function, "libcuda.so.1 has no ", name, ": ", dl_message());
  }

  void check(int error, const char* call) const {
    if (error == 0) return;
    const char* text = nullptr;
    get_error_name(error, &text);
    TORCH_CHECK(false, call, ": ", text ? text : "unknown error", " (", error, ")");
  }

  // The library stays loaded: a second call costs nothing, and a failed first one is tried again.
  static const Driver& instance() {
    static const Driver driver;
    return driver;
  }
};

// CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
constexpr int kMajor = 75, kMinor = 76;

// Mirrors RawDeviceInfo in src/accelerator.rs.
struct RawDeviceInfo {
  char name[256];
  char pci_bus_id[32];
  uint64_t total_memory_bytes;
  int32_t compute_major;
  int32_t compute_minor;
};

}  // namespace

namespace fte {

std::pair<int, int> compute_capability(int index) {
  static std::mutex mutex;
  static std::map<int, std::pair<int, int>> known;
  std::lock_guard lock(mutex);
  auto found = known.find(index);
  if (found != known.end()) return found->second;
  const Driver& driver = Driver::instance();
  int device = 0;
  std::pair<int, int> capability;
  driver.check(driver.device(&device, index), "cuDeviceGet");
  driver.check(driver.attribute(&capability.first, kMajor, device), "cuDeviceGetAttribute");
  driver.check(driver.attribute(&capability.second, kMinor, device), "cuDeviceGetAttribute");
  return known.emplace(index, capability).first->second;
}

}  // namespace fte

FTE_API char* fte_load_cuda() {
  return fte::guarded([&] {
    TORCH_CHECK(
        aoti_torch_abi_version() == TORCH_ABI_VERSION, "libtorch is version ", version_of(aoti_torch_abi_version()),
        " in ", libtorch_cpu().string(), ", this program was built for ", version_of(TORCH_ABI_VERSION));
    // The library path and the program's rpath first, then the folder of the half that is loaded already.
    if (!dlopen(kLibrary, RTLD_NOW | RTLD_GLOBAL)) {
      std::string reason = dl_message();
      // Any other reason is one of a file that was found: a library that it needs, or another version.
      bool missing = reason.rfind(std::string(kLibrary) + ": cannot open shared object file", 0) == 0;
      TORCH_CHECK(missing, kLibrary, " cannot be loaded: ", reason);
      fs::path beside = libtorch_cpu().parent_path() / kLibrary;
      TORCH_CHECK(
          fs::exists(beside), kLibrary, " is neither on LD_LIBRARY_PATH nor in ", beside.parent_path().string(),
          ": install the CUDA build of torch ", version_of(TORCH_ABI_VERSION),
          " with the nvidia wheels it names, and add its folder torch/lib to LD_LIBRARY_PATH");
      TORCH_CHECK(dlopen(beside.c_str(), RTLD_NOW | RTLD_GLOBAL), kLibrary, " cannot be loaded: ", dl_message());
    }
    // Libtorch asks once whether there is a CUDA half, and the answer stays.
    bool taken = true;
    try {
      at::detail::getCUDAHooks().versionCUDART();
    } catch (const c10::Error&) {
      taken = false;
    }
    TORCH_CHECK(taken, kLibrary, " was loaded after libtorch had looked for it: load it first");
  });
}

FTE_API char* fte_cuda_driver_count(int32_t* count) {
  return fte::guarded([&] {
    const Driver& driver = Driver::instance();
    driver.check(driver.device_count(count), "cuDeviceGetCount");
  });
}

FTE_API char* fte_cuda_device_info(int32_t index, RawDeviceInfo* info) {
  return fte::guarded([&] {
    const Driver& driver = Driver::instance();
    int device = 0;
    size_t bytes = 0;
    driver.check(driver.device(&device, index), "cuDeviceGet");
    driver.check(driver.name(info->name, sizeof info->name, device), "cuDeviceGetName");
    driver.check(driver.total_memory(&bytes, device), "cuDeviceTotalMem");
    driver.check(driver.pci_bus_id(info->pci_bus_id, sizeof info->pci_bus_id, device), "cuDeviceGetPCIBusId");
    driver.check(driver.attribute(&info->compute_major, kMajor, device), "cuDeviceGetAttribute");
    driver.check(driver.attribute(&info->compute_minor, kMinor, device), "cuDeviceGetAttribute");
    info->total_memory_bytes = bytes;
  });
}

FTE_API char* fte_set_deterministic(bool on) {
  return fte::guarded([&] {
    // cuBLAS sums in a fixed order only with a workspace of its own, and libtorch asks for this variable.
    if (on) setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
    // Sums inside of NVLink switches have no fixed order; PyTorch's own process group leaves them out as well.
    if (on) setenv("NCCL_ALGO", "^NVLS", /*overwrite=*/0);
    at::globalContext().setDeterministicAlgorithms(on, /*warn_only=*/false);
    // Libtorch would fill every new tensor as well, a pass over memory.
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  });
}
