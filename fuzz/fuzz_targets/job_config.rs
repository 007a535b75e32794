#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fsdp_tests_fuzz::job_config(data));
