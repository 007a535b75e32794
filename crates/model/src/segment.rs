//! The parts of a unit's passes, told to whoever keeps a timeline.

/// A part of a pass, in the order of the pass: first those of a block's forward, then its backward's, then the head's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Segment {
    AttentionInput,
    AttentionCore,
    Rest,
    Down,
    DownBackward,
    RestBackward,
    AttentionCoreBackward,
    AttentionInputBackward,
    HeadNorm,
    /// Logits, loss and gradients of one chunk of tokens.
    HeadChunk,
    HeadNormBackward,
}

impl Segment {
    pub fn name(self) -> &'static str {
        match self {
            Segment::AttentionInput => "attention input",
            Segment::AttentionCore => "attention core",
            Segment::Rest => "rest",
            Segment::Down => "down product",
            Segment::DownBackward => "down product backward",
            Segment::RestBackward => "rest backward",
            Segment::AttentionCoreBackward => "attention core backward",
            Segment::AttentionInputBackward => "attention input backward",
            Segment::HeadNorm => "head norm",
            Segment::HeadChunk => "head chunk",
            Segment::HeadNormBackward => "head norm backward",
        }
    }
}

/// Called where each segment starts, which is where the one before it ends. [`unmarked`] where nobody listens.
pub type Mark<'a> = &'a mut dyn FnMut(Segment);

/// Marks nothing.
pub fn unmarked(_: Segment) {}
