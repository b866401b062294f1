//! Prints the RDMA devices of this machine, or why there is none:
//! `cargo run -p kvxfer-verbs --example rdma_devices`.

use std::process::ExitCode;

use kvxfer_verbs::PortDetails;

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
            match port.details {
                Ok(details) => print(port.number, &details),
                Err(e) => println!("  port {}: {e}", port.number),
            }
        }
    }
    ExitCode::SUCCESS
}

fn print(number: u8, port: &PortDetails) {
    println!(
        "  port {number}: {} {}, MTU {:?} of {:?}, {:?} Mb/s, messages of {} bytes, lid {}",
        port.state,
        port.link_layer,
        port.active_mtu,
        port.max_mtu,
        port.mbps,
        port.max_msg_sz,
        port.lid,
    );
    let gids = match &port.gids {
        Ok(gids) => gids,
        Err(e) => return println!("    {e}"),
    };
    for gid in gids {
        let netdev = gid.netdev.as_deref().unwrap_or("no interface");
        let kind = gid
            .kind
            .map_or("unknown type".to_owned(), |k| k.to_string());
        println!(
            "    gid {}: {kind} {} on {netdev}",
            gid.index,
            gid.address()
        );
    }
}
