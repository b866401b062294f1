//! Configurations as operators write them, and what is said about those that are wrong.

use std::time::Duration;

use kvxfer::config::{
    Bytes, Config, ConfigBuilder, ConfigError, KEYS, KvRole, PathKind, Row, Source, UnknownKeys,
    reference,
};

fn from_json(text: &str) -> Result<(Config, ConfigBuilder), ConfigError> {
    let mut builder = ConfigBuilder::new();
    builder.json(text, "test.json")?;
    Ok((builder.build()?, builder))
}

fn refused(text: &str) -> ConfigError {
    from_json(text)
        .map(|(config, _)| config)
        .expect_err("not a configuration")
}

fn row<'a>(rows: &'a [Row], key: &str) -> &'a Row {
    rows.iter()
        .find(|r| r.key == key)
        .unwrap_or_else(|| panic!("no row {key}"))
}

const NO_WARNINGS: [&str; 0] = [];

const PREFILL: &str = r#"{
    "kv_connector": "MoRIIOConnector",
    "kv_role": "kv_producer",
    "kv_connector_extra_config": {
      "proxy_ip": "127.0.0.1",
      "proxy_ping_port": "36367",
      "http_port": "20005",
      "handshake_port": "6301",
      "notify_port": "6105"
    }
  }"#;

const DECODE: &str = r#"{
    "kv_connector": "MoRIIOConnector",
    "kv_role": "kv_consumer",
    "kv_connector_extra_config": {
      "proxy_ip": "127.0.0.1",
      "http_port": "40005",
      "proxy_ping_port": "36367",
      "handshake_port": "7301",
      "notify_port": "7501"
    }
  }"#;

#[test]
fn connector_documents_parse_as_they_stand() {
    for (text, role) in [(PREFILL, KvRole::Producer), (DECODE, KvRole::Consumer)] {
        let (config, builder) = from_json(text).expect("parses");
        let mut expected = Config::default();
        expected.kv_role = role;
        assert_eq!(config, expected);
        assert_eq!(builder.warnings(), NO_WARNINGS);
        assert_eq!(builder.ignored().len(), 6, "{:?}", builder.ignored());
        let port = row(builder.ignored(), "handshake_port");
        assert!(port.note.contains("set port"), "{}", port.note);
        let place = port.source.to_string();
        assert!(
            place.starts_with("test.json: kv_connector_extra_config.handshake_port at "),
            "{place}"
        );
    }
}

#[test]
fn documents_of_other_engines_parse() {
    let texts = [
        r#"{"kv_role":"kv_producer","proxy_ip":"<PROXY_IP>","proxy_ping_port":36367,"http_prt":8000}"#,
        r#"{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cuda",
            "kv_load_failure_policy":"recompute"}"#,
        r#"{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cuda",
            "kv_connector_extra_config":{"backends":["UCX"]}}"#,
        r#"{"kv_connector":"P2pNcclConnector","kv_role":"kv_producer","kv_rank":0,"kv_parallel_size":2}"#,
        r#"{"kv_connector":"OffloadingConnector","kv_role":"kv_both",
            "kv_connector_extra_config":{"block_size":64,"cpu_bytes_to_use":10000000000}}"#,
        r#"{"kv_connector":"MultiConnector","kv_role":"kv_both","kv_connector_extra_config":
            {"connectors":[{"kv_connector":"NixlConnector","kv_role":"kv_both"}]}}"#,
        r#"{"kv_role":"kv_both","kv_buffer_size":1e9,"kv_rank":null,"kv_ip":"127.0.0.1","kv_port":14579}"#,
    ];
    for text in texts {
        if let Err(error) = from_json(text) {
            panic!("{text}: {error}");
        }
    }
}

#[test]
fn tuning_keys_at_either_level_numbers_or_strings() {
    let (config, _) = from_json(
        r#"{
"kv_role": "kv_consumer",
"kv_connector": "moriio",
"proxy_ip": "<RDMA_IP>",
"proxy_ping_port": 36367,
"http_port": 8004,
"qp_per_transfer": 8,
"num_worker_threads": 8
}"#,
    )
    .expect("parses");
    assert_eq!((config.qp_per_transfer, config.num_worker_threads), (8, 8));
    let (config, _) = from_json(
        r#"{"max_cqe_num":"64","kv_connector_extra_config":{
            "qp_per_transfer":"2","post_batch_size":"-1","enable_notification":"true",
            "rdma_devices":["rdma0","rdma5"],"lease_ttl":"8m","max_memory":"2GiB"}}"#,
    )
    .expect("parses");
    assert_eq!(
        (
            config.qp_per_transfer,
            config.post_batch_size,
            config.max_cqe_num
        ),
        (2, -1, 64)
    );
    assert!(config.enable_notification);
    assert_eq!(
        config.rdma_devices.expect("set").names(),
        ["rdma0", "rdma5"]
    );
    assert_eq!(config.lease_ttl, Duration::from_secs(480));
    assert_eq!(config.max_memory, Bytes(2 << 30));
}

#[test]
fn a_misspelt_key_is_taken_with_a_warning() {
    let (_, builder) = from_json(r#"{"http_prt":8000}"#).expect("parses");
    assert_eq!(
        builder.warnings(),
        [r#"test.json: http_prt at 1:13: unknown key "http_prt" is taken as http_port"#]
    );
    let (config, builder) =
        from_json(r#"{"qp_per_tranfser": 6, "Num-Worker-Threads": 3}"#).expect("parses");
    assert_eq!((config.qp_per_transfer, config.num_worker_threads), (6, 3));
    assert_eq!(builder.warnings().len(), 2);
    let rows = builder.explain().expect("builds");
    assert_eq!(
        row(&rows, "qp_per_transfer").note,
        "misspelt as qp_per_tranfser"
    );
    let (config, builder) =
        from_json(r#"{"kv_connector_extra_confg": {"qp_per_transfer": 6}}"#).expect("parses");
    assert_eq!(config.qp_per_transfer, 6);
    assert!(builder.warnings()[0].contains("is taken as kv_connector_extra_config"));
    // The right and the wrong spelling together are one key given twice.
    let error = refused(r#"{"qp_per_transfer": 6, "qp_per_tranfser": 7}"#);
    assert!(
        matches!(
            error,
            ConfigError::Conflict {
                key: "qp_per_transfer",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn unknown_keys() {
    let text = r#"{"frobnicate": {"password": "hunter2"}, "qp_per_transfer": 2}"#;
    let error = refused(text);
    assert_eq!(
        error.to_string(),
        r#"test.json: frobnicate at 1:16: unknown key "frobnicate""#
    );
    let mut builder = ConfigBuilder::new();
    builder
        .unknown_keys(UnknownKeys::Warn)
        .json(text, "test.json")
        .expect("a warning only");
    assert_eq!(builder.build().expect("builds").qp_per_transfer, 2);
    assert_eq!(builder.warnings().len(), 1);
    assert!(!format!("{builder:?}{error:?}").contains("hunter2"));
    // Too far for a misspelling, near enough for a hint.
    let error = refused(r#"{"max_send_xyz": 1}"#);
    assert!(
        error.to_string().ends_with("did you mean max_send_wr?"),
        "{error}"
    );
}

#[test]
fn syntax_errors_name_the_place() {
    let at = |text: &str| match refused(text) {
        ConfigError::Syntax {
            path,
            line,
            column,
            expected,
            ..
        } => (path, line, column, expected),
        other => panic!("{other}"),
    };
    assert_eq!(at(""), (String::new(), 1, 1, "a value"));
    assert_eq!(at("[]"), (String::new(), 1, 1, "an object"));
    assert_eq!(at("{} x"), (String::new(), 1, 4, "the end of the document"));
    assert_eq!(
        at("{\"kv_role\": \"kv_both\",\n  \"kv_connector_extra_config\": {\n    \"http_port\" 1}}"),
        ("kv_connector_extra_config.http_port".into(), 3, 17, "`:`")
    );
    assert_eq!(
        at(r#"{"backends": ["UCX" "GDS"]}"#),
        ("backends".into(), 1, 21, "`,` or `]`")
    );
    assert_eq!(
        at(r#"{"backends": ["UCX", oops]}"#),
        ("backends[1]".into(), 1, 22, "a value")
    );
    assert_eq!(
        at(r#"{"kv_connector_extra_config": 3}"#),
        ("kv_connector_extra_config".into(), 1, 31, "an object")
    );
    assert_eq!(at(r#"{"a": 1,}"#).3, "a key in double quotes");
    assert_eq!(
        at("{\"a\\").3,
        "a string that is closed with a double quote"
    );
    assert_eq!(
        at("{\"a\\é\": 1}").3,
        "a string without control characters or unknown escapes"
    );
    assert_eq!(at("{\"a\": 01}").3, "a number");
    assert_eq!(at(&"[".repeat(1_000_000)).3, "less nesting");
    // Never a panic, wherever it is cut.
    for end in 0..PREFILL.trim_end().len() {
        refused(&PREFILL[..end]);
    }
}

#[test]
fn bad_values_name_key_value_and_what_is_allowed() {
    let error = refused("{\n \"kv_connector_extra_config\": {\"qp_per_transfer\": \"many\"}}");
    assert_eq!(
        error.to_string(),
        "test.json: kv_connector_extra_config.qp_per_transfer at 2:51: \
         qp_per_transfer is \"many\", expected an integer from 1 to 64"
    );
    for (text, words) in [
        (
            r#"{"qp_per_transfer": 0}"#,
            r#"is "0", expected an integer from 1 to 64"#,
        ),
        (r#"{"qp_per_transfer": 1.5}"#, r#"is "1.5""#),
        (
            r#"{"qp_per_transfer": 99999999999999999999}"#,
            r#"is "99999999999999999999""#,
        ),
        (
            r#"{"post_batch_size": 0}"#,
            "expected -1 (auto), or an integer from 1 to 65536",
        ),
        (
            r#"{"kv_role": "producer"}"#,
            "expected kv_producer, kv_consumer or kv_both",
        ),
        (
            r#"{"path": "warp"}"#,
            "expected auto, or some of arena, process-vm, tcp, rdma",
        ),
        (r#"{"rdma_sl": 16}"#, "expected an integer from 0 to 15"),
        (r#"{"listen": {"host": 1}}"#, r#"is "an object""#),
        (
            r#"{"enable_notification": "maybe"}"#,
            "expected true or false",
        ),
        (r#"{"transfer_timeout": "0s"}"#, "from 10ms to 86400s"),
    ] {
        let error = refused(text);
        assert!(matches!(error, ConfigError::Value { .. }));
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn a_key_given_twice() {
    let error = refused(
        "{\"qp_per_transfer\": 4,\n\"kv_connector_extra_config\": {\"qp_per_transfer\": 8}}",
    );
    assert_eq!(
        error.to_string(),
        "qp_per_transfer is \"4\" (test.json: qp_per_transfer at 1:21) and \"8\" \
         (test.json: kv_connector_extra_config.qp_per_transfer at 2:50); remove one"
    );
    let error = refused(r#"{"port": 1, "port": 2}"#);
    assert!(
        matches!(error, ConfigError::Conflict { key: "port", .. }),
        "{error}"
    );
    let (config, builder) = from_json(r#"{"port": 1, "port": "1"}"#).expect("harmless");
    assert_eq!(config.port, 1);
    assert!(
        builder.warnings()[0].starts_with("port is given twice"),
        "{:?}",
        builder.warnings()
    );
}

#[test]
fn flags_before_environment_before_file_before_default() {
    let mut builder = ConfigBuilder::new();
    builder.flag("qp_per_transfer", "-q", "16").expect("a flag");
    builder
        .env([
            ("KVXFER_QP_PER_TRANSFER", "8"),
            ("KVXFER_PATH", "tcp"),
            ("PATH", "/bin"),
            ("KVXFER_PORT", ""),
        ])
        .expect("an environment");
    let text = r#"{"qp_per_transfer":"2","path":"arena","max_send_wr":128}"#;
    builder
        .json(text, "--kv-transfer-config")
        .expect("a document");
    let config = builder.build().expect("builds");
    assert_eq!(
        (config.qp_per_transfer, config.max_send_wr, config.port),
        (16, 128, 7301)
    );
    assert_eq!(config.path.forced(), Some(PathKind::Tcp));
    assert_eq!(builder.warnings(), NO_WARNINGS);

    let rows = builder.explain().expect("builds");
    let qp = row(&rows, "qp_per_transfer");
    assert_eq!(
        (qp.value.as_str(), &qp.source),
        ("16", &Source::Flag("-q".into()))
    );
    assert_eq!(
        qp.note,
        "overrides 8 (environment variable KVXFER_QP_PER_TRANSFER); \
         overrides 2 (--kv-transfer-config: qp_per_transfer at 1:20)"
    );
    assert_eq!(row(&rows, "path").source, Source::Env("KVXFER_PATH".into()));
    let source = &row(&rows, "max_send_wr").source;
    assert!(matches!(source, Source::File(place) if place.origin == "--kv-transfer-config"));
    assert_eq!(row(&rows, "lease_ttl").source, Source::Default);
    assert_eq!(rows.len(), KEYS.len());
}

#[test]
fn variables_of_other_systems_are_fallbacks() {
    let mori = [
        ("MORI_RDMA_DEVICES", "rdma0,rdma5"),
        ("MORI_RDMA_SL", "3"),
        ("MORI_RDMA_TC", "104"),
        ("ATOM_HOST_IP", "10.1.2.3"),
    ];
    let mut builder = ConfigBuilder::new();
    let config = builder
        .env(mori)
        .expect("an environment")
        .build()
        .expect("builds");
    let devices = config.rdma_devices.expect("set");
    assert!(devices.allows("rdma5") && !devices.allows("rdma1"));
    assert_eq!((config.rdma_sl, config.rdma_tc), (Some(3), Some(104)));
    assert_eq!(config.host_ip, Some([10, 1, 2, 3].into()));
    let rows = builder.explain().expect("builds");
    assert_eq!(
        row(&rows, "rdma_sl").source,
        Source::Env("MORI_RDMA_SL".into())
    );

    let mut builder = ConfigBuilder::new();
    builder
        .env(mori.into_iter().chain([("KVXFER_RDMA_SL", "5")]))
        .expect("an environment");
    assert_eq!(builder.build().expect("builds").rdma_sl, Some(5));
    assert_eq!(builder.ignored()[0].note, "ignored: KVXFER_RDMA_SL is set");

    let error = ConfigBuilder::new()
        .env([("MORI_RDMA_SL", "high")])
        .expect_err("no level")
        .to_string();
    assert_eq!(
        error,
        "environment variable MORI_RDMA_SL: rdma_sl is \"high\", expected an integer from 0 to 15"
    );
}

#[test]
fn stray_variables_are_mentioned() {
    let mut builder = ConfigBuilder::new();
    let vars = [
        ("KVXFER_QP_PER_TRANFSER", "8"),
        ("KVXFER_GPU", "host"),
        ("KVXFER_X", "1"),
    ];
    builder.env(vars).expect("no error");
    assert_eq!(
        builder.warnings(),
        [
            "environment variable KVXFER_QP_PER_TRANFSER is no setting; \
             did you mean KVXFER_QP_PER_TRANSFER?; ignored",
            "environment variable KVXFER_X is no setting; ignored",
        ]
    );
}

#[test]
fn a_variable_that_is_not_unicode() {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;
    let bad = OsStr::from_bytes(b"\xff").to_owned();
    let mut builder = ConfigBuilder::new();
    let others = [
        (bad.clone(), OsString::from("1")),
        ("HOME".into(), bad.clone()),
    ];
    builder.env(others).expect("not ours");
    let error = builder
        .env([(OsString::from("KVXFER_PORT"), bad)])
        .expect_err("ours");
    assert_eq!(
        error,
        ConfigError::NotUnicode {
            name: "KVXFER_PORT".into()
        }
    );
}

#[test]
fn listen_may_name_the_port() {
    let build = |flags: &[(&str, &str)], file: &str| {
        let mut builder = ConfigBuilder::new();
        for (key, value) in flags {
            builder.flag(key, &format!("--{key}"), value)?;
        }
        builder.json(file, "f")?.build()
    };
    let on = |config: Config| {
        let (host, port) = config.listen_on();
        (host.to_owned(), port, config.port)
    };
    let config = build(&[], "{}").expect("builds");
    assert_eq!(on(config), ("127.0.0.1".into(), 7301, 7301));
    let config = build(&[("listen", "[::1]:9000")], r#"{"port": 8000}"#).expect("a flag is above");
    assert_eq!(on(config), ("::1".into(), 9000, 9000));
    let config =
        build(&[("port", "8000")], r#"{"listen": "localhost:9000"}"#).expect("a flag is above");
    assert_eq!(on(config), ("localhost".into(), 8000, 8000));
    let flags = [("port", "8000"), ("listen", "localhost:9000")];
    let error = build(&flags, "{}").expect_err("a conflict");
    assert!(
        matches!(error, ConfigError::Conflict { key: "port", .. }),
        "{error}"
    );
}

#[test]
fn listening_beyond_loopback_needs_a_secret() {
    let check = |text: &str| from_json(text).expect("parses").0.check_listen();
    check("{}").expect("loopback");
    check(r#"{"listen": "127.8.8.8"}"#).expect("loopback");
    check(r#"{"listen": "0.0.0.0", "secret_file": "/etc/kvxfer.key"}"#).expect("a secret");
    check(r#"{"listen": "0.0.0.0", "allow_unauthenticated": true}"#).expect("allowed");
    let host = "0.0.0.0".into();
    assert_eq!(
        check(r#"{"listen": "0.0.0.0"}"#),
        Err(ConfigError::Unauthenticated { host })
    );
    assert!(check(r#"{"listen": "node-7"}"#).is_err());
}

#[test]
fn settings_that_do_not_go_together() {
    let error = refused(r#"{"heartbeat_interval": "4s"}"#);
    assert!(
        matches!(
            error,
            ConfigError::Together {
                key: "heartbeat_timeout",
                ..
            }
        ),
        "{error}"
    );
    let mut config = Config::default();
    config.check().expect("the default is sound");
    config.qp_per_transfer = 0;
    let error = config.check().expect_err("out of range");
    assert!(
        matches!(
            error,
            ConfigError::Value {
                key: "qp_per_transfer",
                source_of: Source::Code,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn batches() {
    let batch = |text: &str| from_json(text).expect("parses").0.fixed_batch_size();
    assert_eq!(batch("{}"), None);
    assert_eq!(batch(r#"{"post_batch_size": -1}"#), None);
    assert_eq!(batch(r#"{"post_batch_size": 64}"#), Some(64));
}

#[test]
fn every_key_takes_what_it_shows() {
    let rows = ConfigBuilder::new().explain().expect("the default builds");
    let (mut flags, mut env) = (ConfigBuilder::new(), ConfigBuilder::new());
    for (key, row) in KEYS.iter().zip(&rows) {
        assert_eq!(key.name, row.key);
        assert!(!key.doc.is_empty() && !key.allowed().is_empty());
        assert!(reference().contains(&format!("| `{}` |", key.name)));
        if !row.value.is_empty() {
            flags
                .flag(key.name, "--x", &row.value)
                .expect("its own default");
            env.env([(key.env(), row.value.clone())])
                .expect("its own default");
        }
    }
    assert_eq!(flags.build(), Ok(Config::default()));
    assert_eq!(env.build(), Ok(Config::default()));
    assert!(flags.flag("http_port", "--x", "1").is_err());
}

#[test]
fn the_documented_defaults() {
    let c = Config::default();
    assert_eq!((c.qp_per_transfer, c.post_batch_size), (4, -1));
    assert_eq!((c.max_send_wr, c.max_cqe_num, c.max_msg_sge), (0, 0, 0));
    assert!((1..=4).contains(&c.num_worker_threads));
    assert!(!c.enable_notification && !c.allow_unauthenticated && !c.allow_bench);
    assert_eq!(c.port, 7301);
    assert_eq!(c.transfer_timeout, Duration::from_secs(30));
    assert_eq!(c.lease_ttl, Duration::from_secs(480));
    assert_eq!(
        (c.path.forced(), c.path.allows(PathKind::Rdma)),
        (None, true)
    );
}
