//! The failures of a run in the order in which they came, as error records in the store. Where no launcher sees the ranks
//! end, they learn of each other's ends by this, and agree on which was the first.

use std::time::Duration;

use crate::ControlError;
use crate::error_file::ErrorRecord;
use crate::store::Store;

/// JSON lines.
pub(crate) const KEY: &str = "failures";

/// Longest message that is published, in bytes: the records of all ranks share one value of the store.
const MAX_MESSAGE_BYTES: usize = 500;

/// Adds a record.
///
/// # Errors
/// The store is gone, or holds too many records already.
pub fn publish(store: &mut Store, record: &ErrorRecord) -> Result<(), ControlError> {
    store.append(KEY, &line(record))
}

/// Those published so far.
///
/// # Errors
/// The store is gone.
pub fn list(store: &mut Store) -> Result<Vec<ErrorRecord>, ControlError> {
    match store.get(KEY, Duration::ZERO) {
        Ok(lines) => Ok(parse(&lines)),
        Err(ControlError::KeyTimeout { .. }) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The one that caused the others: the first that can be a cause, else the first.
pub fn first_cause(records: &[ErrorRecord]) -> Option<&ErrorRecord> {
    records.iter().find(|record| record.primary).or(records.first())
}

pub(crate) fn line(record: &ErrorRecord) -> Vec<u8> {
    let message = &record.message;
    let end = (0..=MAX_MESSAGE_BYTES.min(message.len())).rev().find(|&at| message.is_char_boundary(at)).unwrap_or(0);
    let short = ErrorRecord { message: message[..end].to_owned(), causes: Vec::new(), ..record.clone() };
    let mut line = serde_json::to_vec(&short).expect("plain fields are always representable as JSON");
    line.push(b'\n');
    line
}

/// Lines that are no records are left out: they are of another version, and say nothing here.
pub(crate) fn parse(lines: &[u8]) -> Vec<ErrorRecord> {
    lines.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExitStatus;
    use crate::error_file::ErrorKind;
    use crate::store::StoreServer;

    #[test]
    fn the_first_primary_failure_is_the_cause_whoever_came_first() {
        let server = StoreServer::bind(("127.0.0.1", 0)).unwrap();
        let addr = ("127.0.0.1", server.local_addr().port());
        let mut store = Store::connect(addr, Duration::from_secs(10)).unwrap();
        assert_eq!(list(&mut store).unwrap(), []);
        let record = |rank, kind| ErrorRecord::new(rank, rank, kind, "é".repeat(400), ExitStatus::Failed);
        publish(&mut store, &record(2, ErrorKind::PeerLost)).unwrap();
        assert_eq!(first_cause(&list(&mut store).unwrap()).unwrap().rank, 2);
        publish(&mut store, &record(1, ErrorKind::Io)).unwrap();
        publish(&mut store, &record(0, ErrorKind::NonFinite)).unwrap();
        let records = list(&mut store).unwrap();
        assert_eq!(records.iter().map(|r| r.rank).collect::<Vec<_>>(), [2, 1, 0]);
        assert_eq!(records[0].message, "é".repeat(250));
        assert_eq!(first_cause(&records).unwrap().rank, 1);
        assert_eq!(first_cause(&[]), None);
    }
}
