//! What the other launchers say, that one is gone, and what follows.

use fsdp_control::ExitStatus;

use crate::link::{Farewell, Message};
use crate::supervise::{Ending, Phase, Supervisor, Word};

impl Supervisor<'_> {
    /// Takes what another launcher has to say.
    pub fn hear(&mut self, index: usize) {
        self.nodes.peers[index].link.write_some();
        self.nodes.peers[index].link.read_some();
        // What comes after the head's word is for the next start.
        while self.word.is_none()
            && let Some(message) = self.nodes.peers[index].link.take()
        {
            self.take_message(index, message);
        }
        if self.word.is_none()
            && let Some(reason) = self.nodes.peers[index].link.closed().map(str::to_owned)
        {
            self.lose(index, &reason);
        }
    }

    fn take_message(&mut self, index: usize, message: Message) {
        let peer = &mut self.nodes.peers[index];
        match message {
            Message::Stop { has_deadline } => self.stop(has_deadline),
            Message::End { is_hang } => self.end_all_once(if is_hang { Ending::Hang } else { Ending::Failure }),
            Message::Kill => self.force(),
            Message::RankFailed(failure) => self.note_failure(*failure),
            Message::WhereAre { failed } => {
                let ranks = self.places_but(failed);
                self.nodes.peers[index].link.send(&Message::Places { failed, ranks });
            }
            Message::Places { failed, ranks } => {
                if let Some(failure) = self.history.failures.iter_mut().find(|failure| failure.rank == failed) {
                    failure.others.extend(ranks);
                }
            }
            Message::Ended(ended) => {
                peer.is_done = true;
                self.history.num_stopped += ended.num_stopped;
                self.history.forced |= ended.forced;
                self.history.unkillable.extend(ended.unkillable);
                self.history.early.extend(ended.early);
            }
            Message::GaveUp(farewell) => {
                peer.is_done = true;
                self.history.lost_node = true;
                self.history.add_fault(Farewell::new(farewell.failure_status(), farewell.lines));
                self.end_all(Ending::Failure);
            }
            Message::Verdict(farewell) => {
                peer.is_done = true;
                self.word = Some(Word::Verdict(farewell));
                // They have ended, unless the head gives up.
                self.end_all_once(Ending::Failure);
            }
            Message::Restart(restart) => {
                peer.is_done = true;
                self.word = Some(Word::Restart(restart));
            }
            Message::Hello(_) | Message::Start(_) => self.lose(index, "it sent a message out of turn"),
        }
    }

    /// As [`Supervisor::end_all`], on the word of another launcher, which hears no echo.
    fn end_all_once(&mut self, why: Ending) {
        if matches!(self.phase, Phase::Running | Phase::Suspecting(_) | Phase::Stopping(_)) {
            self.end_all(why);
        }
    }

    /// Another launcher is gone, or as good as gone.
    pub fn lose(&mut self, index: usize, reason: &str) {
        let peer = &mut self.nodes.peers[index];
        if peer.is_done {
            return;
        }
        peer.is_done = true;
        let line = format!("{} is lost: {reason}", peer.name());
        self.history.lost_node = true;
        self.history.add_fault(Farewell::new(ExitStatus::Failed, vec![line]));
        self.end_all(Ending::LostNode);
    }
}
