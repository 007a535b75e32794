//! The engine on real ranks: processes over shared memory.
//!
//! - `ranks`: starts them; `job`: tiny models, their data, and training them.
//! - `memory`: what is allocated is what the plan says.
//! - `precision`: dtypes by parameter, the fp16 loss scaler.
//! - `non_finite`: a step that is not finite names its place and changes nothing.
//! - `placement`: offloading, replicas, carriers of collectives, steps started ahead, the timeline.
//! - `same_numbers`: splits, reruns, recompute, prefetch, delays and validation do not change results.

mod job;
mod memory;
mod non_finite;
mod placement;
mod precision;
mod ranks;
mod same_numbers;

#[test]
#[ignore = "started by the other tests"]
fn rank() {
    let mut world = ranks::World::join();
    match std::env::var("FSDP_TEST_CASE").unwrap().as_str() {
        "memory" => memory::rank(&mut world),
        "precision" => precision::rank(&mut world),
        "non_finite" => non_finite::rank(&mut world),
        "offload" => placement::rank_offload(&mut world),
        "replicas" => placement::rank_replicas(&mut world),
        "carriers" => placement::rank_carriers(&mut world),
        "ahead" => placement::rank_ahead(&mut world),
        "timeline" => placement::rank_timeline(&mut world),
        "splits" => same_numbers::rank_splits(&mut world),
        "large" => same_numbers::rank_large(&mut world),
        "same bits" => same_numbers::rank_same_bits(&mut world),
        "many steps" => same_numbers::rank_many_steps(&mut world),
        other => panic!("no case {other}"),
    }
}
