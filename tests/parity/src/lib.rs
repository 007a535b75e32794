//! The built binaries against PyTorch: the same models on the same data must give the same numbers.
//!
//! A golden is a tiny model, its data, and what `transformers` + `torch.optim.AdamW` made of them; `scripts/goldens.py`
//! wrote them, so no PyTorch is needed here. The tests start the real `fsdp-launch` that lies in the same target folder;
//! variables choose other folders, and a GPU to compute on.
//!
//! - [`golden`]: a golden, and how near a curve or an exported model is to it.
//! - [`job`]: one run of `fsdp-launch` over a golden, and what it left behind.
//! - [`export`]: the tensors of an exported Hugging Face folder.
//! - [`place`]: the device, the binaries and the goldens, by variables.

#![forbid(unsafe_code)]

pub mod export;
pub mod golden;
pub mod job;
pub mod place;
