//! Whatever the format: it survives the wire, its fingerprint covers all of it, and its sizes are
//! the sums of its parts.

mod tape;

use kvxfer::layout::{
    Axis, AxisKind, CacheGroup, DType, GroupKind, KvFormat, LayerFormat, ModelIdentity, Scaling,
    TensorFormat, TensorRole,
};
use proptest::prelude::*;
use serde_json::Value;
use tape::{Tape, tape};

/// Any format: groups of every kind, layers that differ, split axes, scales.
fn any_format(tape: &mut Tape) -> KvFormat {
    let mut model = ModelIdentity::new(tape.pick(&["llama", "x"]), None);
    if tape.chance(2) {
        model.id = Some("a/b".into());
        model.revision = Some("c".into());
        model = model.with_fact("vocab_size", tape.below(9));
    }
    let groups = (0..1 + tape.below(3)).map(|g| any_group(tape, g)).collect();
    KvFormat::new(model, groups).expect("a valid format")
}

fn any_group(tape: &mut Tape, g: u64) -> CacheGroup {
    let (kind, block_tokens) = match tape.below(3) {
        0 => (GroupKind::Full, tape.pick(&[1_u32, 4, 16])),
        1 => (GroupKind::SlidingWindow { tokens: 64 }, 8),
        _ => (GroupKind::StateSlots, 0),
    };
    let mut layer = tape.below(3) as u32;
    let mut layers = Vec::new();
    for _ in 0..1 + tape.below(3) {
        layers.push(LayerFormat {
            layer,
            draft: tape.chance(4),
            tensors: any_tensors(tape, u64::from(block_tokens)),
        });
        layer += 1 + tape.below(2) as u32;
    }
    CacheGroup {
        name: format!("g{g}"),
        kind,
        block_tokens,
        layers,
    }
}

fn any_tensors(tape: &mut Tape, tokens: u64) -> Vec<TensorFormat> {
    let mut tensors = Vec::new();
    for t in 0..1 + tape.below(2) {
        let heads = tape.pick(&[1, 2, 8]);
        let mut axes = vec![
            Axis::new(AxisKind::Head, heads),
            Axis::new(AxisKind::Dim, 4),
        ];
        if tape.chance(3) {
            axes.push(Axis::new(AxisKind::Dim, 2));
        }
        if tokens > 0 {
            axes.push(Axis::new(AxisKind::Token, tokens));
        }
        tape.shuffle(&mut axes);
        let head = axes.iter().position(|a| a.kind == AxisKind::Head);
        let sharded = head.filter(|_| tape.chance(2)).map(|h| h as u32);
        let name = format!("t{t}");
        let scaling = match tape.below(4) {
            0 => Some(Scaling::constant(0.5)),
            1 => Some(Scaling::Constant {
                axes: vec![AxisKind::Head],
                bits: (0..heads).map(|h| (1.0 + h as f32).to_bits()).collect(),
            }),
            2 => Some(Scaling::Tensor {
                name: format!("s{t}"),
            }),
            _ => None,
        };
        if let Some(Scaling::Tensor { name }) = &scaling {
            tensors.push(TensorFormat {
                name: name.clone(),
                role: TensorRole::Scale,
                dtype: DType::F32,
                axes: vec![Axis::new(AxisKind::Head, heads)],
                sharded: sharded.map(|_| 0),
                scaling: None,
            });
        }
        tensors.push(TensorFormat {
            name,
            role: tape.pick(&[TensorRole::Key, TensorRole::Value, TensorRole::State]),
            dtype: tape.pick(&[DType::Bf16, DType::F8E4m3, DType::F8E4m3Fnuz, DType::F32]),
            axes,
            sharded,
            scaling,
        });
    }
    tensors
}

/// Every place of a JSON value that holds no further one.
fn leaves(value: &Value, path: &str, out: &mut Vec<String>) {
    match value {
        Value::Array(list) if !list.is_empty() => {
            for (i, item) in list.iter().enumerate() {
                leaves(item, &format!("{path}/{i}"), out);
            }
        }
        Value::Object(map) if !map.is_empty() => {
            for (key, item) in map {
                leaves(item, &format!("{path}/{key}"), out);
            }
        }
        _ => out.push(path.to_owned()),
    }
}

/// Other values that a field could have. At least one of them is valid for every field that can
/// change by itself.
fn others(value: &Value) -> Vec<Value> {
    let mut out = vec![
        Value::Null,
        "other".into(),
        true.into(),
        false.into(),
        serde_json::json!({"constant": {"axes": [], "bits": [0x4000_0000]}}),
        serde_json::json!({"sliding_window": {"tokens": 77}}),
        serde_json::json!({"fact": "other"}),
    ];
    for word in [
        "full", "key", "latent", "bf16", "fp8_e5m2", "kv", "channel", "width",
    ] {
        out.push(word.into());
    }
    for number in [0_u64, 1, 2, 3, 5, 9, 16, 0x3f00_0000] {
        out.push(number.into());
    }
    out.retain(|other| other != value);
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn formats_survive_the_wire(mut tape in tape()) {
        let format = any_format(&mut tape);
        let json = serde_json::to_string(&format).expect("encodes");
        let packed = rmp_serde::to_vec(&format).expect("encodes");
        let named = rmp_serde::to_vec_named(&format).expect("encodes");
        for back in [
            serde_json::from_str::<KvFormat>(&json).expect("decodes"),
            rmp_serde::from_slice(&packed).expect("decodes"),
            rmp_serde::from_slice(&named).expect("decodes"),
        ] {
            prop_assert_eq!(&back, &format);
            prop_assert_eq!(back.fingerprint(), format.fingerprint());
        }
    }

    #[test]
    fn a_fingerprint_changes_with_every_field(mut tape in tape()) {
        let format = any_format(&mut tape);
        let json = serde_json::to_value(&format).expect("encodes");
        let mut paths = Vec::new();
        leaves(&json, "", &mut paths);
        let path = &paths[tape.below(paths.len() as u64) as usize];
        for other in others(json.pointer(path).expect("it is there")) {
            let mut changed = json.clone();
            *changed.pointer_mut(path).expect("it is there") = other;
            if let Ok(changed) = serde_json::from_value::<KvFormat>(changed) {
                // A default that is written out is no change.
                if changed != format {
                    prop_assert_ne!(changed.canonical(), format.canonical(), "{}", path);
                    prop_assert_ne!(changed.fingerprint(), format.fingerprint(), "{}", path);
                }
            }
        }
    }

    #[test]
    fn sizes_are_the_sums_of_the_parts(mut tape in tape()) {
        let format = any_format(&mut tape);
        let mut per_token = 0;
        for group in format.groups() {
            let mut bytes = 0;
            for tensor in group.layers.iter().flat_map(|l| &l.tensors) {
                let mut elements = 1;
                for axis in &tensor.axes {
                    elements *= axis.extent;
                }
                bytes += elements * tensor.dtype.bytes();
            }
            prop_assert_eq!(group.block_bytes(), bytes);
            if group.block_tokens > 0 {
                per_token += bytes.div_ceil(u64::from(group.block_tokens));
            }
        }
        prop_assert_eq!(format.bytes_per_token(), per_token);
    }
}
