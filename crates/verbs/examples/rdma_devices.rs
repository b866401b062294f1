//! Prints the RDMA devices of this machine, or why there is none:
//! `cargo run -p kvxfer-verbs --example rdma_devices`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let devices = match kvxfer_verbs::rdma_devices() {
        Ok(devices) => devices,
        Err(e) => {
            println!("{e}");
            return ExitCode::from(4);
        }
    };
    for device in devices {
        println!("{} {:016x} {}", device.name, device.guid, device.transport);
        let details = match device.details {
            Ok(details) => details,
            Err(e) => {
                println!("  {e}");
                continue;
            }
        };
        println!("  {:?}", details.limits);
        for port in details.ports {
            println!(
                "  port {}: {} {}, MTU {:?} of {:?}, {:?} Mb/s, messages of {} bytes, lid {}",
                port.number,
                port.state,
                port.link_layer,
                port.active_mtu,
                port.max_mtu,
                port.mbps,
                port.max_msg_sz,
                port.lid,
            );
            for gid in port.gids {
                let netdev = gid.netdev.as_deref().unwrap_or("no interface");
                println!(
                    "    gid {}: {} {} on {netdev}",
                    gid.index,
                    gid.kind,
                    gid.address()
                );
            }
        }
    }
    ExitCode::SUCCESS
}
