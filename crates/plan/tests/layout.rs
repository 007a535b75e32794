//! Flat layout and slot map over odd sizes: every element has one place on one rank, nothing overlaps.

mod common;

use std::ops::Range;

use common::small_llama;
use fsdp_plan::layout::ALIGN;
use fsdp_plan::units::units;
use fsdp_plan::{Architecture, Dtype, Group, SlotMap, UnitLayout};
use proptest::prelude::*;

const DTYPES: [(Dtype, Dtype); 4] =
    [(Dtype::Bf16, Dtype::Fp32), (Dtype::Fp32, Dtype::Fp32), (Dtype::Fp16, Dtype::Bf16), (Dtype::Fp32, Dtype::Bf16)];

prop_compose! {
    fn architectures()(
        (vocab_size, hidden_size, intermediate_size) in (1..400usize, 1..200usize, 1..300usize),
        num_layers in 1..6usize,
        (num_kv_heads, group, half_head_dim) in (1..4usize, 1..4usize, 1..20usize),
        (tied, qkv_bias, o_bias, mlp_bias, qk_norm) in any::<(bool, bool, bool, bool, bool)>(),
    ) -> Architecture {
        Architecture {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_heads: num_kv_heads * group,
            num_kv_heads,
            head_dim: 2 * half_head_dim,
            qkv_bias,
            o_bias,
            mlp_bias,
            qk_norm,
            ..small_llama(num_layers, tied)
        }
    }
}

/// Gives parameters different dtypes, by name.
fn dtypes(rules: &[usize]) -> impl Fn(&str) -> (Dtype, Dtype) {
    move |name| DTYPES[rules[name.bytes().map(usize::from).sum::<usize>() % rules.len()]]
}

fn check_group(group: &Group, world_size: usize) {
    let shards: Vec<Range<usize>> = (0..world_size).map(|rank| group.shard(rank, world_size)).collect();

    // Shards of all ranks tile the group: equal, aligned, in rank order.
    let mut end = 0;
    for shard in &shards {
        assert_eq!(shard.start, end);
        assert_eq!(shard.len(), group.shard_numel(world_size));
        assert_eq!(shard.len() % ALIGN, 0);
        end = shard.end;
    }
    assert_eq!(end, group.numel);

    // Parameters start aligned, do not overlap, and padding is as short as it can be.
    let mut end = 0;
    for p in &group.params {
        assert_eq!(p.offset % ALIGN, 0);
        assert!(p.offset >= end && p.offset < end + ALIGN, "{}", p.name);
        assert_eq!(p.numel, p.shape.iter().product::<usize>());
        end = p.offset + p.numel;
    }
    assert!(end <= group.numel && group.numel - end < world_size * ALIGN);
    assert_eq!(group.numel % (world_size * ALIGN), 0);

    // Pieces of a parameter over all ranks tile it, in rank order.
    for p in &group.params {
        let mut done = 0;
        for shard in &shards {
            let Some(piece) = p.in_shard(shard) else { continue };
            assert_eq!(piece.in_param, done, "{}", p.name);
            assert_eq!(shard.start + piece.in_shard, p.offset + piece.in_param, "{}", p.name);
            assert!(piece.len > 0 && piece.in_shard + piece.len <= shard.len(), "{}", p.name);
            done += piece.len;
        }
        assert_eq!(done, p.numel, "{}", p.name);
    }

    // The decayed range of the shards holds the decayed parameters and no others.
    for p in &group.params {
        assert_eq!(p.has_weight_decay, p.shape.len() >= 2, "{}", p.name);
        for (rank, shard) in shards.iter().enumerate() {
            let Some(piece) = p.in_shard(shard) else { continue };
            let decayed = 0..group.shard_decay_numel(rank, world_size);
            let (first, last) = (piece.in_shard, piece.in_shard + piece.len - 1);
            assert_eq!(decayed.contains(&first), p.has_weight_decay, "{}", p.name);
            assert_eq!(decayed.contains(&last), p.has_weight_decay, "{}", p.name);
        }
    }
}

/// Byte ranges of a unit's groups, which must not overlap and must fit.
fn check_ranges(groups: &[Group], bytes: usize, range: impl Fn(&Group) -> (usize, usize)) {
    let mut end = 0;
    for (offset, len) in groups.iter().map(range) {
        assert!(offset >= end);
        assert_eq!(offset % 256, 0);
        end = offset + len;
    }
    assert!(end <= bytes);
}

fn check_unit(layout: &UnitLayout, num_params: usize, world_size: usize) {
    let mut placed: Vec<usize> = layout.groups.iter().flat_map(|g| &g.params).map(|p| p.index).collect();
    placed.sort();
    assert_eq!(placed, (0..num_params).collect::<Vec<_>>());
    for (i, group) in layout.groups.iter().enumerate() {
        let key = |g: &Group| (g.param_dtype, g.reduce_dtype);
        assert!(layout.groups[..i].iter().all(|other| key(other) != key(group)));
        check_group(group, world_size);
    }
    check_ranges(&layout.groups, layout.slot_bytes, |g| (g.slot_offset_bytes, g.numel * g.param_dtype.size_bytes()));
    check_ranges(&layout.groups, layout.grad_bytes, |g| (g.grad_offset_bytes, g.numel * g.reduce_dtype.size_bytes()));
}

fn check_slots(map: &SlotMap, layouts: &[UnitLayout], tied: bool) {
    let num_units = layouts.len();
    let is_block = |unit: usize| unit > 0 && unit + 1 < num_units;
    let mut largest = (vec![0; map.slot_bytes.len()], vec![0; map.grad_bytes.len()]);
    for (unit, layout) in layouts.iter().enumerate() {
        let (slot, grad) = (map.slot_of_unit[unit], map.grad_of_unit[unit]);
        assert!(layout.slot_bytes <= map.slot_bytes[slot] && layout.grad_bytes <= map.grad_bytes[grad]);
        largest.0[slot] = largest.0[slot].max(layout.slot_bytes);
        largest.1[grad] = largest.1[grad].max(layout.grad_bytes);
        // Ends never size the blocks' slots.
        assert_eq!(slot < map.num_block_slots, is_block(unit));
        let shares_grad = |other: &usize| map.grad_of_unit[*other] == grad;
        assert!((0..num_units).filter(shares_grad).all(|other| is_block(other) == is_block(unit)));
        // While one block's gradients are reduced, the next one's are written.
        if is_block(unit) && is_block(unit + 1) {
            assert_ne!(grad, map.grad_of_unit[unit + 1]);
        }
    }
    // No buffer is larger than its largest tenant, none is unused.
    assert_eq!((&map.slot_bytes, &map.grad_bytes), (&largest.0, &largest.1));
    let ends_differ = map.slot_of_unit[0] != map.slot_of_unit[num_units - 1];
    assert_eq!(ends_differ, tied, "a tied weight is read by the head while the head's own parameters are");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_element_has_one_place(
        arch in architectures(),
        rules in prop::collection::vec(0..DTYPES.len(), 1..8),
        prefetch in 0..4usize,
    ) {
        let units = units(&arch);
        for world_size in 1..=9 {
            let layouts: Vec<_> = units.iter().map(|u| UnitLayout::new(u, world_size, dtypes(&rules))).collect();
            for (unit, layout) in units.iter().zip(&layouts) {
                check_unit(layout, unit.params.len(), world_size);
            }
            for num_resident in 0..=arch.num_layers {
                let map = SlotMap::new(&layouts, num_resident, prefetch, arch.tie_word_embeddings);
                let num_shared = (arch.num_layers - num_resident).min(1 + prefetch);
                prop_assert_eq!(map.num_block_slots, num_resident + num_shared);
                check_slots(&map, &layouts, arch.tie_word_embeddings);
            }
        }
    }
}

#[test]
fn a_block_by_hand() {
    // D 64, F 128, Q 64, K 32: q 4096, k 2048, v 2048, o 4096, gate, up and down 8192 each, then two norms of 64.
    let arch = small_llama(1, false);
    let layout = UnitLayout::new(&units(&arch)[1], 3, |_| (Dtype::Bf16, Dtype::Fp32));
    let [group] = &layout.groups[..] else { panic!("one group: {layout:?}") };
    let places: Vec<_> = group.params.iter().map(|p| (p.name.rsplit('.').nth(1).unwrap(), p.offset)).collect();
    let expected = [
        ("q_proj", 0),
        ("k_proj", 4096),
        ("v_proj", 6144),
        ("o_proj", 8192),
        ("gate_proj", 12288),
        ("up_proj", 20480),
        ("down_proj", 28672),
        ("input_layernorm", 36864),
        ("post_attention_layernorm", 36928),
    ];
    assert_eq!(places, expected);
    // 36,992 elements; the next multiple of 3 * 64 is 193 * 192.
    assert_eq!((group.decay_numel, group.numel), (36864, 37056));
    assert_eq!((layout.slot_bytes, layout.grad_bytes), (74240, 148224));
    // Shards of 12,352: the last one's ends with two norms and 64 elements of padding.
    let decayed = [0, 1, 2].map(|rank| group.shard_decay_numel(rank, 3));
    assert_eq!(decayed, [12352, 12352, 12160]);
}
