//! The architecture and the compute dies of an AMD GPU, from what the kernel's compute driver tells of its nodes. HIP has the former
//! in a structure that is not safe to take (see `sys::hip_types`).

use std::fs;
use std::path::Path;

use kvxfer_verbs::PciAddress;

/// What the driver tells of a GPU.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Node {
    /// The architecture's name, such as `gfx942`.
    pub(super) arch: String,
    /// Compute dies; kernels before 6.5 do not say.
    pub(super) xccs: Option<u32>,
}

pub(super) fn node(gpu: PciAddress) -> Option<Node> {
    node_in(Path::new("/sys/class/kfd/kfd/topology/nodes"), gpu)
}

fn node_in(nodes: &Path, gpu: PciAddress) -> Option<Node> {
    let nodes = fs::read_dir(nodes).ok()?;
    nodes
        .flatten()
        .filter_map(|node| fs::read_to_string(node.path().join("properties")).ok())
        .find_map(|text| of_node(&text, gpu))
}

/// One node's, if it is this GPU. The parts of a divided GPU differ in their function.
fn of_node(text: &str, gpu: PciAddress) -> Option<Node> {
    let value = |key: &str| {
        text.lines().find_map(|line| {
            let (name, value) = line.split_once(' ')?;
            (name == key)
                .then(|| value.trim().parse::<u32>().ok())
                .flatten()
        })
    };
    let location = value("location_id")?;
    let (bus, device) = (location >> 8 & 0xff, location >> 3 & 0x1f);
    // Older kernels have no domains here.
    let domain = value("domain").unwrap_or(0);
    let same = domain == gpu.domain && bus == gpu.bus.into() && device == gpu.device.into();
    let version = value("gfx_target_version").filter(|version| same && *version != 0)?;
    let (major, minor, step) = (version / 10_000, version / 100 % 100, version % 100);
    Some(Node {
        arch: format!("gfx{major}{minor:x}{step:x}"),
        xccs: value("num_xcc").filter(|n| *n > 0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(version: u32, location: u32, domain: u32) -> String {
        format!(
            "cpu_cores_count 0\nsimd_count 1216\ngfx_target_version {version}\nvendor_id 4098\nlocation_id {location}\ndomain {domain}\nnum_xcc 8\n"
        )
    }

    #[test]
    fn the_version_is_a_name_in_hexadecimal() {
        let at = PciAddress {
            domain: 2,
            bus: 0xc1,
            device: 3,
            function: 0,
        };
        let location = 0xc1 << 8 | 3 << 3;
        for (version, name) in [
            (90_402, "gfx942"),
            (90_010, "gfx90a"),
            (90_500, "gfx950"),
            (110_000, "gfx1100"),
            (120_500, "gfx1250"),
        ] {
            let found = Some(Node {
                arch: name.to_owned(),
                xccs: Some(8),
            });
            assert_eq!(of_node(&text(version, location, 2), at), found);
            // A part of a divided GPU.
            assert_eq!(of_node(&text(version, location | 5, 2), at), found);
        }
        // Other places, the CPU's node, and text that is none.
        for text in [
            text(90_402, location, 1),
            text(90_402, location + 0x100, 2),
            text(90_402, location + 8, 2),
            text(0, location, 2),
            "location_id x\ngfx_target_version".to_owned(),
            String::new(),
        ] {
            assert_eq!(of_node(&text, at), None, "{text}");
        }
    }

    #[test]
    fn nodes_are_found_in_their_folders() {
        let folder = std::env::temp_dir().join(format!("kvxfer-kfd-{}", std::process::id()));
        for (name, properties) in [("0", text(0, 0, 0)), ("1", text(90_402, 0x500, 0))] {
            fs::create_dir_all(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("properties"), properties).unwrap();
        }
        let at = "0000:05:00.0".parse().unwrap();
        let found = node_in(&folder, at);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found.map(|node| node.arch).as_deref(), Some("gfx942"));
        assert_eq!(node_in(&folder, at), None);
    }
}
