use std::os::unix::fs::symlink;

use super::*;
use crate::sys::fake::Folder;

/// Makes a device on PCI below a bridge, and gives its folder.
fn pci(sys: &Path, path: &str, node: &str) -> PathBuf {
    let folder = sys.join("devices").join(path);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("numa_node"), node).unwrap();
    folder
}

fn class(sys: &Path, name: &str) -> PathBuf {
    let folder = sys.join("class/infiniband").join(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn a_card_tells_its_driver_its_way_and_its_node() {
    let folder = Folder::new();
    let sys = folder.path();
    let card = pci(sys, "pci0000:40/0000:40:01.0/0000:41:00.1", "1\n");
    let driver = sys.join("bus/pci/drivers/mlx5_core");
    fs::create_dir_all(&driver).unwrap();
    symlink(&driver, card.join("driver")).unwrap();
    symlink(&card, class(sys, "mlx5_0").join("device")).unwrap();
    assert_eq!(super::driver(sys, "mlx5_0").as_deref(), Some("mlx5_core"));
    let place = rdma_place(sys, "mlx5_0");
    assert_eq!(
        place.pci_path,
        ["pci0000:40", "0000:40:01.0", "0000:41:00.1"]
    );
    assert_eq!(
        (place.pci(), place.numa_node),
        (Some("0000:41:00.1"), Some(1))
    );

    let devices = sys.join("bus/pci/devices");
    fs::create_dir_all(&devices).unwrap();
    symlink(&card, devices.join("0000:41:00.1")).unwrap();
    assert_eq!(pci_place(sys, "0000:41:00.1"), Some(place));
    for address in [
        "0000:41:00.2",
        "mlx5_0",
        "",
        "../../../devices",
        "0000:41:00:1",
    ] {
        assert_eq!(pci_place(sys, address), None, "{address}");
    }

    // A part of a card hangs on it, and is where that is.
    let part = card.join("mlx5_core.sf.4");
    fs::create_dir_all(&part).unwrap();
    symlink(&part, class(sys, "mlx5_2").join("device")).unwrap();
    let place = rdma_place(sys, "mlx5_2");
    assert_eq!(
        (place.pci(), place.numa_node),
        (Some("0000:41:00.1"), Some(1))
    );
}

#[test]
fn a_machine_of_one_node_has_none() {
    let folder = Folder::new();
    let sys = folder.path();
    for (name, node) in [("a", "-1\n"), ("b", "many\n")] {
        let card = pci(sys, &format!("pci0000:00/0000:00:0{name}.0"), node);
        symlink(&card, class(sys, name).join("device")).unwrap();
        let place = rdma_place(sys, name);
        assert_eq!(place.numa_node, None, "{node}");
        assert!(place.pci().is_some());
    }
}

#[test]
fn a_software_device_is_on_no_bus_and_known_by_its_files() {
    let folder = Folder::new();
    let sys = folder.path();
    fs::write(class(sys, "rxe0").join("parent"), "eth0\n").unwrap();
    fs::write(
        class(sys, "siw0").join("node_desc"),
        "Software iWARP stack\n",
    )
    .unwrap();
    fs::write(class(sys, "odd").join("node_desc"), "anything\n").unwrap();
    let told = |name| driver(sys, name);
    assert_eq!(told("rxe0").as_deref(), Some("rdma_rxe"));
    assert_eq!(told("siw0").as_deref(), Some("siw"));
    assert_eq!((told("odd"), told("none")), (None, None));
    assert_eq!(rdma_place(sys, "rxe0"), Place::default());
}

#[test]
fn addresses_of_pci() {
    for address in ["0000:41:00.0", "10000:e1:00.0", "0000:ff:1f.7"] {
        assert!(is_pci(address), "{address}");
    }
    for text in [
        "0000:41:00",
        "41:00.0",
        "0000.41.00.0.0",
        "0000:4g:00.0",
        "pci0000:00",
        "",
    ] {
        assert!(!is_pci(text), "{text}");
    }
    assert!(is_pci_root("pci0000:40") && is_pci_root("pci10000:00"));
    assert!(!is_pci_root("pci") && !is_pci_root("0000:40"));
}
