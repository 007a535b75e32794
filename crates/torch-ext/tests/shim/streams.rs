use std::time::Duration;

use fsdp_torch_ext::{Event, Stream, TorchError, accelerator};
use tch::{Device, Tensor};

#[test]
fn the_cpu_has_one_stream_that_is_always_done() {
    let stream = Stream::current(Device::Cpu).unwrap();
    assert_eq!(stream.device(), Device::Cpu);
    {
        let _guard = stream.enter().unwrap();
        let _inner = stream.enter().unwrap();
        assert_eq!(Stream::current(Device::Cpu).unwrap(), stream);
        assert_eq!((Tensor::from(1f32) + 1.0).double_value(&[]), 2.0);
    }
    assert!(stream.query().unwrap());
    stream.synchronize().unwrap();
}

#[test]
fn events_of_the_cpu_are_done_when_they_are_recorded() {
    let stream = Stream::new_from_pool(Device::Cpu, true).unwrap();
    assert_eq!(stream, Stream::current(Device::Cpu).unwrap());
    assert!(stream.native_handle().unwrap().is_null());
    let mut event = Event::new(Device::Cpu).unwrap();
    for recorded in [false, true] {
        if recorded {
            event.record(&stream).unwrap();
        }
        assert!(event.query().unwrap());
        stream.wait(&event).unwrap();
        event.synchronize().unwrap();
    }
}

#[test]
fn events_with_timing_tell_the_time_between_their_records() {
    let stream = Stream::current(Device::Cpu).unwrap();
    let [mut start, mut end] = [(); 2].map(|()| Event::with_timing(Device::Cpu).unwrap());
    start.record(&stream).unwrap();
    assert!(start.elapsed_ms(&end).unwrap_err().message.contains("recorded"));
    std::thread::sleep(Duration::from_millis(20));
    end.record(&stream).unwrap();
    let ms = start.elapsed_ms(&end).unwrap();
    assert!((20.0..5000.0).contains(&ms), "{ms}");
    assert_eq!(end.elapsed_ms(&start).unwrap(), -ms);

    let mut untimed = Event::new(Device::Cpu).unwrap();
    untimed.record(&stream).unwrap();
    assert!(start.elapsed_ms(&untimed).unwrap_err().message.contains("timing"));
}

#[test]
fn what_a_device_lacks_is_an_error() {
    let absent = Device::Cuda(accelerator::device_count().unwrap());
    let table: [(&str, Result<(), TorchError>, &str); 4] = [
        ("stream of an absent GPU", Stream::new_from_pool(absent, true).map(drop), ""),
        ("memory of the CPU", accelerator::memory_stats(Device::Cpu).map(drop), "CPU"),
        ("memory of an absent GPU", accelerator::memory_stats(absent).map(drop), ""),
        ("stream of another type", Stream::current(Device::Mps).map(drop), "Mps"),
    ];
    for (what, result, part) in table {
        let error = result.expect_err(what);
        assert!(error.message.to_lowercase().contains(&part.to_lowercase()), "{what}: {error}");
        println!("{what}: {error}");
    }
}

#[test]
fn without_an_accelerator_there_are_no_devices() {
    if accelerator::is_available() {
        return;
    }
    assert_eq!(accelerator::device_count().unwrap(), 0);
    for error in [
        accelerator::set_current(Device::Cuda(0)).unwrap_err(),
        accelerator::reset_peak_memory(Device::Cuda(0)).unwrap_err(),
    ] {
        println!("{error}");
        assert!(error.op.starts_with("accelerator::"));
    }
}
