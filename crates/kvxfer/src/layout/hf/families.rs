//! The model types that are known, and what tells them apart.

/// How a model's attention keeps its cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attention {
    /// Keys and values for each KV head.
    Heads,
    /// One compressed latent with its rope part, the same for every head (MLA).
    Latent,
}

/// Where a number comes from that the file does not give. Files are written by libraries that leave
/// out what is their class's default, so for some types the default is part of the file's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Otherwise {
    /// It must be there.
    Missing,
    /// The class's default.
    Default(u64),
    /// Worked out from other fields: head size from hidden size and heads, KV heads from heads.
    Derived,
}

/// Which layers keep a window of tokens only, where `layer_types` does not list them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Windows {
    /// None does.
    None,
    /// All do, if there is a `sliding_window`.
    All,
    /// With `use_sliding_window`, those from `max_window_layers` on.
    FromLayer,
    /// All but every n-th.
    AllButEvery(u64),
}

/// One `model_type`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    pub(super) model_type: &'static str,
    /// The type of the model in `text_config`, for types that nest it.
    pub(super) nested: Option<&'static str>,
    pub(super) attention: Attention,
    pub(super) heads: Otherwise,
    pub(super) kv_heads: Otherwise,
    pub(super) head_dim: Otherwise,
    pub(super) vocab_size: Otherwise,
    pub(super) windows: Windows,
    /// The window where the file does not say: `sliding_window` of the class.
    pub(super) window: Option<u64>,
    /// Whether `num_nextn_predict_layers` counts layers that the model has.
    pub(super) mtp: bool,
}

const PLAIN: Family = Family {
    model_type: "",
    nested: None,
    attention: Attention::Heads,
    heads: Otherwise::Missing,
    kv_heads: Otherwise::Missing,
    head_dim: Otherwise::Derived,
    vocab_size: Otherwise::Missing,
    windows: Windows::None,
    window: None,
    mtp: false,
};

const GEMMA3_TEXT: Family = Family {
    model_type: "gemma3_text",
    heads: Otherwise::Default(8),
    kv_heads: Otherwise::Default(4),
    head_dim: Otherwise::Default(256),
    vocab_size: Otherwise::Default(262_208),
    windows: Windows::AllButEvery(6),
    window: Some(4096),
    ..PLAIN
};

const FAMILIES: [Family; 17] = [
    Family {
        model_type: "deepseek_v2",
        attention: Attention::Latent,
        ..PLAIN
    },
    Family {
        model_type: "deepseek_v3",
        attention: Attention::Latent,
        mtp: true,
        ..PLAIN
    },
    Family {
        model_type: "gemma2",
        head_dim: Otherwise::Default(256),
        windows: Windows::AllButEvery(2),
        window: Some(4096),
        ..PLAIN
    },
    Family {
        model_type: "gemma3",
        nested: Some("gemma3_text"),
        ..GEMMA3_TEXT
    },
    GEMMA3_TEXT,
    Family {
        model_type: "glm4",
        head_dim: Otherwise::Default(128),
        ..PLAIN
    },
    Family {
        model_type: "glm4_moe",
        head_dim: Otherwise::Missing,
        mtp: true,
        ..PLAIN
    },
    Family {
        model_type: "gpt_oss",
        head_dim: Otherwise::Default(64),
        windows: Windows::AllButEvery(2),
        window: Some(128),
        ..PLAIN
    },
    Family {
        model_type: "kimi_k2",
        attention: Attention::Latent,
        mtp: true,
        ..PLAIN
    },
    Family {
        model_type: "llama",
        kv_heads: Otherwise::Derived,
        ..PLAIN
    },
    Family {
        model_type: "mistral",
        windows: Windows::All,
        window: Some(4096),
        ..PLAIN
    },
    Family {
        model_type: "mixtral",
        windows: Windows::All,
        ..PLAIN
    },
    Family {
        model_type: "phi3",
        kv_heads: Otherwise::Derived,
        windows: Windows::All,
        ..PLAIN
    },
    Family {
        model_type: "qwen2",
        windows: Windows::FromLayer,
        window: Some(4096),
        ..PLAIN
    },
    Family {
        model_type: "qwen2_moe",
        windows: Windows::FromLayer,
        window: Some(4096),
        ..PLAIN
    },
    Family {
        model_type: "qwen3",
        head_dim: Otherwise::Default(128),
        windows: Windows::FromLayer,
        window: Some(4096),
        ..PLAIN
    },
    Family {
        model_type: "qwen3_moe",
        head_dim: Otherwise::Missing,
        windows: Windows::FromLayer,
        window: Some(4096),
        ..PLAIN
    },
];

impl Family {
    pub(super) fn of(model_type: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|f| f.model_type == model_type)
    }

    pub(super) fn known() -> Vec<&'static str> {
        FAMILIES.iter().map(|f| f.model_type).collect()
    }
}
