//! The architecture of an AMD GPU, from what the kernel's compute driver tells of its nodes. HIP has it in
//! a structure that is not safe to take (see `sys::hip_types`).

use std::fs;
use std::path::Path;

use kvxfer_verbs::PciAddress;

/// The architecture's name, such as `gfx942`.
pub(super) fn architecture(gpu: PciAddress) -> Option<String> {
    architecture_in(Path::new("/sys/class/kfd/kfd/topology/nodes"), gpu)
}

fn architecture_in(nodes: &Path, gpu: PciAddress) -> Option<String> {
    let nodes = fs::read_dir(nodes).ok()?;
    nodes
        .flatten()
        .filter_map(|node| fs::read_to_string(node.path().join("properties")).ok())
        .find_map(|text| of_node(&text, gpu))
}

/// One node's, if it is this GPU. The parts of a divided GPU differ in their function.
fn of_node(text: &str, gpu: PciAddress) -> Option<String> {
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
    Some(format!("gfx{major}{minor:x}{step:x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(version: u32, location: u32, domain: u32) -> String {
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
            let text = node(version, location, 2);
            assert_eq!(of_node(&text, at).as_deref(), Some(name));
            // A part of a divided GPU.
            let text = node(version, location | 5, 2);
            assert_eq!(of_node(&text, at).as_deref(), Some(name));
        }
        // Other places, the CPU's node, and text that is none.
        for text in [
            node(90_402, location, 1),
            node(90_402, location + 0x100, 2),
            node(90_402, location + 8, 2),
            node(0, location, 2),
            "location_id x\ngfx_target_version".to_owned(),
            String::new(),
        ] {
            assert_eq!(of_node(&text, at), None, "{text}");
        }
    }

    #[test]
    fn nodes_are_found_in_their_folders() {
        let folder = std::env::temp_dir().join(format!("kvxfer-kfd-{}", std::process::id()));
        for (name, text) in [("0", node(0, 0, 0)), ("1", node(90_402, 0x500, 0))] {
            fs::create_dir_all(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("properties"), text).unwrap();
        }
        let at = "0000:05:00.0".parse().unwrap();
        let found = architecture_in(&folder, at);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found.as_deref(), Some("gfx942"));
        assert_eq!(architecture_in(&folder, at), None);
    }
}
