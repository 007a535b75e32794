//! Rotary tables against the formulas of their papers, in f64.

use std::f64::consts::PI;
use std::path::Path;

use fsdp_model::RopeTables;
use fsdp_plan::{Architecture, Dtype};
use tch::{Device, Kind, Tensor};

const SEQ_LEN: usize = 300;

/// Wavelength of a frequency -> the frequency as the scaling leaves it.
type Scaling = fn(f64, f64) -> f64;

fn llama3(frequency: f64, wavelength: f64) -> f64 {
    // factor 8, low 1, high 4, 256 positions: short waves stay, long ones are stretched.
    let smooth = (256.0 / wavelength - 1.0) / (4.0 - 1.0);
    match wavelength {
        w if w < 256.0 / 4.0 => frequency,
        w if w > 256.0 / 1.0 => frequency / 8.0,
        _ => (1.0 - smooth) * frequency / 8.0 + smooth * frequency,
    }
}

#[test]
fn tables_follow_their_formulas() {
    let cases: [(&str, Scaling); 3] = [
        ("null", |frequency, _| frequency),
        (r#"{"rope_type": "linear", "factor": 2.5}"#, |frequency, _| frequency / 2.5),
        (
            r#"{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256}"#,
            llama3,
        ),
    ];
    for (scaling_json, scaling) in cases {
        let json = format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 64, "intermediate_size": 8,
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "rope_theta": 500.0,
                "rope_scaling": {scaling_json}}}"#
        );
        let arch = Architecture::parse(Path::new("config.json"), &json).unwrap();
        let tables = RopeTables::new(&arch, SEQ_LEN, Dtype::Fp32, Device::Cpu).unwrap();
        let half = arch.head_dim / 2;
        for position in 0..SEQ_LEN {
            for i in 0..half {
                let frequency = 500.0f64.powf(-(i as f64) / half as f64);
                let angle = position as f64 * scaling(frequency, 2.0 * PI / frequency);
                let at = [position as i64, i as i64];
                for (table, expected) in [(&tables.cos, angle.cos()), (&tables.sin, angle.sin())] {
                    // Angles are fp32: a relative error of 1e-7 in one of up to 300.
                    let off = (table.double_value(&at) - expected).abs();
                    assert!(off < 1e-4, "{scaling_json}: position {position}, pair {i}: off by {off}");
                }
            }
        }
    }
}

#[test]
fn tables_are_rounded_to_the_buffer_dtype() {
    let json = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}"#;
    let arch = Architecture::parse(Path::new("config.json"), json).unwrap();
    let exact = RopeTables::new(&arch, 50, Dtype::Fp32, Device::Cpu).unwrap();
    let rounded = RopeTables::new(&arch, 50, Dtype::Bf16, Device::Cpu).unwrap();
    let to_bf16 = |t: &Tensor| t.to_kind(Kind::BFloat16).to_kind(Kind::Float);
    assert!(rounded.cos.equal(&to_bf16(&exact.cos)) && rounded.sin.equal(&to_bf16(&exact.sin)));
    assert!(!rounded.sin.equal(&exact.sin));
}
