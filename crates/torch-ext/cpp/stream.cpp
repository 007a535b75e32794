// Streams and events of any device type, through c10's virtual guard: no CUDA header, no CUDA library at link time.
#include "shim.h"

#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace {

// Mirrors RawStream in src/stream.rs.
struct RawStream {
  int64_t id;
  int32_t device_index;
  int32_t device_type;
};

c10::Stream unpack(RawStream s) {
  return c10::Stream::unpack3(
      s.id, static_cast<c10::DeviceIndex>(s.device_index), static_cast<c10::DeviceType>(s.device_type));
}

RawStream pack(const c10::Stream& s) {
  return {s.id(), s.device_index(), static_cast<int32_t>(s.device_type())};
}

}  // namespace

FTE_API char* fte_stream_current(int32_t type, int32_t index, RawStream* stream) {
  return fte::guarded([&] {
    c10::Device device(static_cast<c10::DeviceType>(type), static_cast<c10::DeviceIndex>(index));
    *stream = pack(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  });
}

FTE_API char* fte_stream_from_pool(int32_t type, int32_t index, bool high_priority, RawStream* stream) {
  return fte::guarded([&] {
    c10::Device device(static_cast<c10::DeviceType>(type), static_cast<c10::DeviceIndex>(index));
    *stream = pack(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device, high_priority));
  });
}

FTE_API char* fte_stream_query(RawStream stream, bool* done) {
  return fte::guarded([&] { *done = unpack(stream).query(); });
}

FTE_API char* fte_stream_synchronize(RawStream stream) {
  return fte::guarded([&] { unpack(stream).synchronize(); });
}

FTE_API char* fte_stream_native_handle(RawStream stream, void** handle) {
  return fte::guarded([&] { *handle = unpack(stream).native_handle(); });
}

FTE_API char* fte_stream_enter(RawStream stream, c10::StreamGuard** guard) {
  return fte::guarded([&] { *guard = new c10::StreamGuard(unpack(stream)); });
}

FTE_API char* fte_stream_leave(c10::StreamGuard* guard) {
  return fte::guarded([&] { delete guard; });
}

FTE_API char* fte_event_new(int32_t type, bool timing, c10::Event** event) {
  return fte::guarded([&] {
    auto flag = timing ? c10::EventFlag::BACKEND_DEFAULT : c10::EventFlag::PYTORCH_DEFAULT;
    *event = new c10::Event(static_cast<c10::DeviceType>(type), flag);
  });
}

FTE_API void fte_event_delete(c10::Event* event) { delete event; }

FTE_API char* fte_event_record(c10::Event* event, RawStream stream) {
  return fte::guarded([&] { event->record(unpack(stream)); });
}

FTE_API char* fte_event_block(const c10::Event* event, RawStream stream) {
  return fte::guarded([&] { event->block(unpack(stream)); });
}

FTE_API char* fte_event_query(const c10::Event* event, bool* done) {
  return fte::guarded([&] { *done = event->query(); });
}

FTE_API char* fte_event_synchronize(const c10::Event* event) {
  return fte::guarded([&] { event->synchronize(); });
}

FTE_API char* fte_event_elapsed_ms(const c10::Event* start, const c10::Event* end, double* ms) {
  return fte::guarded([&] { *ms = start->elapsedTime(*end); });
}
