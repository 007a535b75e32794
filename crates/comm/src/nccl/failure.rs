//! Why a communicator was aborted, and how ranks' reports of where they were tell it: NCCL itself cannot say who is missing.

use std::time::Duration;

use fsdp_control::progress::Op;
use serde_json::{Value, json};

use crate::sum::{kind_code, kind_from_code};
use crate::{Call, CommError, Phase};

#[derive(Clone, Debug)]
pub(super) enum Failure {
    /// NCCL (or the device) reports an error.
    Nccl { message: String, is_remote: bool, call: Option<Call> },
    /// A collective was not done in time. `missing`: those known not to have called it.
    Timeout { missing: Vec<usize>, waited: Duration, call: Call },
    /// Another rank has called something else in its place.
    Mismatch { call: Call, other_rank: usize, other_call: Call },
    /// Another rank has given up; with the last call of this one.
    PeerGaveUp { other_rank: usize, call: Call },
}

impl Failure {
    pub fn call(&self) -> Option<&Call> {
        match self {
            Failure::Nccl { call, .. } => call.as_ref(),
            Failure::Timeout { call, .. } | Failure::Mismatch { call, .. } | Failure::PeerGaveUp { call, .. } => {
                Some(call)
            }
        }
    }

    pub fn to_error(&self, rank: usize) -> CommError {
        match self.clone() {
            Failure::Nccl { message, is_remote, call } => CommError::Nccl { rank, message, is_remote, call },
            Failure::Timeout { missing, waited, call } => {
                CommError::Timeout { rank, missing, phase: Phase::Written, waited, call }
            }
            Failure::Mismatch { call, other_rank, other_call } => {
                CommError::Mismatch { rank, call, other_rank, other_call }
            }
            Failure::PeerGaveUp { other_rank, call } => CommError::PeerGaveUp { rank, other_rank, call },
        }
    }

    /// What a timeout is by what the `members` of its group have reported.
    pub fn judged(self, reports: &Reports, rank: usize, members: &[usize]) -> Failure {
        let Failure::Timeout { waited, call, .. } = self else { return self };
        let others = || members.iter().copied().filter(|&other| other != rank);
        let is_behind =
            |other: usize| reports.of(other).is_none_or(|r| r.last.as_ref().is_none_or(|c| c.seq < call.seq));
        let missing: Vec<usize> = others().filter(|&other| is_behind(other)).collect();
        let waits_for_other = |other: usize| {
            let theirs = reports.of(other)?.oldest.clone()?;
            (theirs.seq == call.seq && theirs != call).then_some((other, theirs))
        };
        match others().find_map(waits_for_other) {
            Some((other_rank, other_call)) if missing.is_empty() => Failure::Mismatch { call, other_rank, other_call },
            _ => Failure::Timeout { missing, waited, call },
        }
    }
}

/// What one rank has to say when the run ends.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Report {
    /// The last collective that it has called, on any group.
    pub last: Option<Call>,
    /// The first one that is not done.
    pub oldest: Option<Call>,
}

/// By rank; `None` = it did not answer.
#[derive(Debug)]
pub(super) struct Reports(pub Vec<Option<Report>>);

impl Reports {
    fn of(&self, rank: usize) -> Option<&Report> {
        self.0.get(rank).and_then(Option::as_ref)
    }
}

impl Report {
    pub fn to_json(&self) -> Value {
        json!({ "last": self.last.as_ref().map(call_to_json), "oldest": self.oldest.as_ref().map(call_to_json) })
    }

    pub fn from_json(value: &Value) -> Option<Report> {
        let call = |key: &str| value.get(key).and_then(call_from_json);
        value.is_object().then(|| Report { last: call("last"), oldest: call("oldest") })
    }
}

fn call_to_json(call: &Call) -> Value {
    json!([call.op as u32, call.seq, call.kind.map_or(0, kind_code), call.num_bytes, call.detail, call.unit])
}

fn call_from_json(value: &Value) -> Option<Call> {
    Some(Call {
        op: Op::from_code(u32::try_from(value[0].as_u64()?).ok()?)?,
        seq: value[1].as_u64()?,
        kind: kind_from_code(u8::try_from(value[2].as_u64()?).ok()?),
        num_bytes: value[3].as_u64()?,
        detail: u8::try_from(value[4].as_u64()?).ok()?,
        unit: value[5].as_str()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use fsdp_control::error_file::ErrorKind;
    use tch::Kind;

    use super::*;

    fn call(op: Op, seq: u64, unit: &str) -> Call {
        Call { op, seq, kind: Some(Kind::BFloat16), num_bytes: 64, detail: 1, unit: unit.into() }
    }

    #[test]
    fn reports_say_who_is_behind_or_elsewhere() {
        let mine = call(Op::AllGather, 7, "layers.3");
        let other = call(Op::ReduceScatter, 7, "layers.3");
        let report = |last: &Call, oldest: Option<&Call>| {
            let report = Report { last: Some(last.clone()), oldest: oldest.cloned() };
            assert_eq!(Report::from_json(&report.to_json()).as_ref(), Some(&report));
            Some(report)
        };
        let with_me = report(&mine, Some(&mine));
        let ahead = report(&call(Op::Barrier, 9, ""), Some(&mine));
        let behind = report(&call(Op::Barrier, 6, ""), None);
        let elsewhere = report(&other, Some(&other));
        let none_called = Some(Report { last: None, oldest: None });
        for (theirs, members, expected) in [
            ([&with_me, &ahead], [0, 1, 2], "Timeout { missing: []"),
            ([&None, &ahead], [0, 1, 2], "Timeout { missing: [1]"),
            ([&behind, &none_called], [0, 1, 2], "Timeout { missing: [1, 2]"),
            ([&behind, &elsewhere], [0, 1, 2], "Timeout { missing: [1]"),
            ([&ahead, &elsewhere], [0, 1, 2], "Mismatch"),
        ] {
            let reports = Reports(vec![with_me.clone(), theirs[0].clone(), theirs[1].clone()]);
            let timeout = Failure::Timeout { missing: vec![], waited: Duration::ZERO, call: mine.clone() };
            let judged = timeout.judged(&reports, 0, &members);
            assert!(format!("{judged:?}").starts_with(expected), "{judged:?}, not {expected}");
        }
        // A rank that is not of the group is not missed.
        let reports = Reports(vec![with_me.clone(), None, with_me.clone()]);
        let timeout = Failure::Timeout { missing: vec![], waited: Duration::ZERO, call: mine };
        let judged = timeout.judged(&reports, 0, &[0, 2]);
        assert!(matches!(&judged, Failure::Timeout { missing, .. } if missing.is_empty()), "{judged:?}");
        // Another rank's failure is no root cause here.
        assert_eq!(judged.to_error(0).error_kind(), ErrorKind::CollectiveTimeout);
    }
}
