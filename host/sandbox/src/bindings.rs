//! The host's side of the four worlds, generated from `wit/`.
//!
//! Policy: calls that wait for something outside are `async`, all others are plain functions, and every import may end the
//! guest (`trappable`): reaching a limit is not an answer that a guest could ignore.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated code")]

/// `fulgurite:agent/agent`, and the vocabulary that the other worlds share.
pub(crate) mod agent {
    wasmtime::component::bindgen!({
        path: ["../../wit/types", "../../wit/agent"],
        world: "fulgurite:agent/agent",
        imports: {
            "fulgurite:agent/llm.chat": async | trappable,
            "fulgurite:agent/llm.start": async | trappable,
            "fulgurite:agent/llm.finish": async | trappable,
            "fulgurite:agent/llm.wait-any": async | trappable,
            "fulgurite:agent/llm.[method]pending.next": async | trappable,
            "fulgurite:agent/tools.list-tools": async | trappable,
            "fulgurite:agent/tools.call": async | trappable,
            "fulgurite:agent/tools.start": async | trappable,
            "fulgurite:agent/tools.finish": async | trappable,
            "fulgurite:agent/tools.wait-any": async | trappable,
            "fulgurite:agent/tools.[method]pending.ready": async | trappable,
            default: trappable,
        },
        exports: { default: async },
        with: {
            "fulgurite:agent/llm.request": crate::agent_llm::RequestDraft,
            "fulgurite:agent/llm.completion": crate::agent_llm::FinishedCall,
            "fulgurite:agent/llm.pending": crate::agent_call::PendingLlm,
            "fulgurite:agent/tools.pending": crate::agent_tools::PendingTool,
            "fulgurite:agent/emit.span": crate::agent_emit::OpenSpan,
        },
        require_store_data_send: true,
    });
}

/// `fulgurite:grader/grader`.
pub(crate) mod grader {
    wasmtime::component::bindgen!({
        path: ["../../wit/types", "../../wit/grader"],
        world: "fulgurite:grader/grader",
        imports: { "fulgurite:grader/judge.chat": async | trappable, default: trappable },
        exports: { default: async },
        with: {
            "fulgurite:types/types": crate::bindings::agent::fulgurite::types::types,
            "fulgurite:grader/judge.request": crate::grants::judge::JudgeRequest,
            "fulgurite:grader/judge.answer": crate::grants::judge::JudgeAnswer,
        },
        require_store_data_send: true,
    });
}

/// `fulgurite:tool/tool-plugin`.
pub(crate) mod tool {
    wasmtime::component::bindgen!({
        path: ["../../wit/types", "../../wit/tool"],
        world: "fulgurite:tool/tool-plugin",
        imports: {
            "fulgurite:tool/http.send": async | trappable,
            "fulgurite:tool/sqlite.open": async | trappable,
            "fulgurite:tool/sqlite.[method]database.query": async | trappable,
            "fulgurite:tool/sqlite.[method]database.execute": async | trappable,
            default: trappable,
        },
        exports: { default: async },
        with: {
            "fulgurite:types/types": crate::bindings::agent::fulgurite::types::types,
            "fulgurite:tool/http.request": crate::grants::http::RequestDraft,
            "fulgurite:tool/http.response": crate::grants::http::FinishedRequest,
            "fulgurite:tool/sqlite.rows": crate::grants::sqlite::FoundRows,
            "fulgurite:tool/sqlite.database": crate::grants::sqlite::OpenDatabase,
        },
        require_store_data_send: true,
    });
}

/// `fulgurite:algorithm/algorithm`.
pub(crate) mod algorithm {
    wasmtime::component::bindgen!({
        path: ["../../wit/types", "../../wit/algorithm"],
        world: "fulgurite:algorithm/algorithm",
        imports: {
            "fulgurite:algorithm/rollouts.next-items": async | trappable,
            "fulgurite:algorithm/rollouts.enqueue": async | trappable,
            "fulgurite:algorithm/rollouts.[method]batch.await-all": async | trappable,
            "fulgurite:algorithm/rollouts.[method]batch.await-count": async | trappable,
            "fulgurite:algorithm/rollouts.[method]batch.carry": async | trappable,
            "fulgurite:algorithm/rollouts.[method]batch.cancel": async | trappable,
            "fulgurite:algorithm/rollouts.carried": async | trappable,
            "fulgurite:algorithm/trajectories.import": async | trappable,
            "fulgurite:algorithm/policy.anchor": async | trappable,
            "fulgurite:algorithm/policy.forward-backward": async | trappable,
            "fulgurite:algorithm/policy.forward": async | trappable,
            "fulgurite:algorithm/policy.backward": async | trappable,
            "fulgurite:algorithm/policy.optim-step": async | trappable,
            "fulgurite:algorithm/policy.snapshot": async | trappable,
            "fulgurite:algorithm/policy.freeze-reference": async | trappable,
            "fulgurite:algorithm/policy.sample": async | trappable,
            "fulgurite:algorithm/policy.save": async | trappable,
            "fulgurite:algorithm/policy.load": async | trappable,
            "fulgurite:algorithm/resources.template": async | trappable,
            "fulgurite:algorithm/resources.publish": async | trappable,
            "fulgurite:algorithm/llm.chat": async | trappable,
            "fulgurite:algorithm/metrics.scalar": async | trappable,
            "fulgurite:algorithm/metrics.note": async | trappable,
            default: trappable,
        },
        exports: { default: async },
        with: {
            "fulgurite:types/types": crate::bindings::agent::fulgurite::types::types,
            "fulgurite:algorithm/common.sampling": crate::algorithm_host::SamplingDraft,
            "fulgurite:algorithm/rollouts.item": crate::algorithm_host::ItemHandle,
            "fulgurite:algorithm/rollouts.group": crate::algorithm_host::GroupDraft,
            "fulgurite:algorithm/rollouts.batch": crate::algorithm_host::BatchHandle,
            "fulgurite:algorithm/trajectories.transition": crate::algorithm_host::TransitionHandle,
            "fulgurite:algorithm/trajectories.trajectory": crate::algorithm_host::TrajectoryHandle,
            "fulgurite:algorithm/policy.loss": crate::algorithm_policy::LossDraft,
            "fulgurite:algorithm/policy.optimiser-step": crate::algorithm_policy::OptimiserDraft,
        },
        require_store_data_send: true,
    });
}
