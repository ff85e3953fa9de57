//! What a simulated worker reads of the coordinator's messages: all of the protocol but specs, plans and lists of peers, which it has no use
//! for. So reading them is not part of what is measured.

use thaw_proto::pb;

/// `thaw.v1.CoordinatorMessage`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Command {
    #[prost(uint64, tag = "1")]
    pub(crate) leader_epoch: u64,
    #[prost(oneof = "Order", tags = "2, 3, 4, 5, 6, 7, 8")]
    pub(crate) order: Option<Order>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Order {
    #[prost(message, tag = "2")]
    Welcome(pb::Welcome),
    #[prost(message, tag = "3")]
    Start(Start),
    #[prost(message, tag = "4")]
    Propose(Propose),
    #[prost(message, tag = "5")]
    Commit(pb::Commit),
    #[prost(message, tag = "6")]
    Stop(pb::StopTrainer),
    #[prost(message, tag = "7")]
    Committed(pb::CheckpointCommitted),
    #[prost(message, tag = "8")]
    Suspend(pb::SuspendTrainer),
}

/// `thaw.v1.StartTrainer`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Start {
    #[prost(string, tag = "1")]
    pub(crate) run: String,
    #[prost(uint32, tag = "2")]
    pub(crate) slot: u32,
    #[prost(string, tag = "3")]
    pub(crate) incarnation: String,
}

/// `thaw.v1.Propose`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Propose {
    #[prost(string, tag = "3")]
    pub(crate) incarnation: String,
    #[prost(uint64, tag = "4")]
    pub(crate) generation: u64,
    #[prost(uint32, tag = "5")]
    pub(crate) rank: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use pb::coordinator_message::Message as Full;
    use prost::Message as _;

    fn read(message: Full) -> Command {
        let full = pb::CoordinatorMessage { leader_epoch: 7, message: Some(message) };
        Command::decode(full.encode_to_vec().as_slice()).unwrap()
    }

    #[test]
    fn what_is_read_is_what_the_protocol_says() {
        let start = pb::StartTrainer {
            run: "run-1".to_owned(),
            slot: 3,
            incarnation: "one".to_owned(),
            spec: Some(pb::RunSpec { name: "demo".to_owned(), ..Default::default() }),
            plan: Some(pb::Plan::default()),
            run_url: "file:///runs/run-1/".to_owned(),
            ..Default::default()
        };
        let expected = Start { run: "run-1".to_owned(), slot: 3, incarnation: "one".to_owned() };
        assert_eq!(read(Full::Start(start)), Command { leader_epoch: 7, order: Some(Order::Start(expected)) });
        let propose = pb::Propose {
            run: "run-1".to_owned(),
            incarnation: "one".to_owned(),
            generation: 5,
            rank: 9,
            peers: Some(["a:1", "b:2"].iter().collect()),
            key: vec![1; 32],
            ..Default::default()
        };
        let expected = Propose { incarnation: "one".to_owned(), generation: 5, rank: 9 };
        assert_eq!(read(Full::Propose(propose)).order, Some(Order::Propose(expected)));
        let commit = pb::Commit { run: "run-1".to_owned(), slot: 0, incarnation: "one".to_owned(), generation: 5 };
        assert_eq!(read(Full::Commit(commit.clone())).order, Some(Order::Commit(commit)));
        let stop = pb::StopTrainer { incarnation: "one".to_owned(), ..Default::default() };
        assert_eq!(read(Full::Stop(stop.clone())).order, Some(Order::Stop(stop)));
        let welcome = pb::Welcome { heartbeat_interval_ms: 400 };
        assert_eq!(read(Full::Welcome(welcome)).order, Some(Order::Welcome(welcome)));
    }
}
