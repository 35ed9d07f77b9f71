//! Generated bindings of the four worlds. Private in spirit: only the export macros reach in from outside, and the
//! modules beside this one translate everything into plain Rust.
#![allow(missing_docs, unreachable_pub, unsafe_code, clippy::all, clippy::pedantic, clippy::restriction)]

/// `fulgurite:agent/agent`.
pub mod agent {
    wit_bindgen::generate!({
        path: ["../../wit/types", "../../wit/agent"],
        world: "fulgurite:agent/agent@0.1.0",
        generate_all,
        generate_unused_types: true,
        pub_export_macro: true,
        export_macro_name: "export_agent",
        default_bindings_module: "fulgurite_sdk::wit::agent",
    });
}

/// `fulgurite:grader/grader`.
pub mod grader {
    wit_bindgen::generate!({
        path: ["../../wit/types", "../../wit/grader"],
        world: "fulgurite:grader/grader@0.1.0",
        with: { "fulgurite:types/types@0.1.0": crate::wit::agent::fulgurite::types::types },
        generate_all,
        pub_export_macro: true,
        export_macro_name: "export_grader",
        default_bindings_module: "fulgurite_sdk::wit::grader",
    });
}

/// `fulgurite:tool/tool-plugin`.
pub mod tool {
    wit_bindgen::generate!({
        path: ["../../wit/types", "../../wit/tool"],
        world: "fulgurite:tool/tool-plugin@0.1.0",
        with: { "fulgurite:types/types@0.1.0": crate::wit::agent::fulgurite::types::types },
        generate_all,
        pub_export_macro: true,
        export_macro_name: "export_tool",
        default_bindings_module: "fulgurite_sdk::wit::tool",
    });
}

/// `fulgurite:algorithm/algorithm`.
pub mod algorithm {
    wit_bindgen::generate!({
        path: ["../../wit/types", "../../wit/algorithm"],
        world: "fulgurite:algorithm/algorithm@0.1.0",
        with: { "fulgurite:types/types@0.1.0": crate::wit::agent::fulgurite::types::types },
        generate_all,
        pub_export_macro: true,
        export_macro_name: "export_algorithm",
        default_bindings_module: "fulgurite_sdk::wit::algorithm",
    });
}
