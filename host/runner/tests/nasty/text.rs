//! Components as text: what no compiler would make.

/// The parts of an agent written by hand. It says `"fine"` unless a part says otherwise.
pub(crate) struct AgentText {
    /// Imports of the component.
    pub(crate) imports: &'static str,
    /// Core functions made of them, lowered with `$libc`, and how they are handed to the main module as `host`.
    pub(crate) lowered: String,
    pub(crate) handed: &'static str,
    /// Fields of the main module.
    pub(crate) fields: &'static str,
    /// Body of `realloc` in the module that owns the memory.
    pub(crate) realloc: &'static str,
    /// Body of `run`; returns the place of the result.
    pub(crate) run: &'static str,
    /// Options of the lift.
    pub(crate) options: &'static str,
    /// Pages of memory.
    pub(crate) memory: &'static str,
}

impl Default for AgentText {
    fn default() -> Self {
        Self {
            imports: "",
            lowered: String::new(),
            handed: "",
            fields: "",
            realloc: "i32.const 4096",
            run: "i32.const 512",
            options: "",
            memory: "2",
        }
    }
}

impl AgentText {
    pub(crate) fn text(&self) -> String {
        let Self { imports, lowered, handed, fields, realloc, run, options, memory } = self;
        format!(
            r#"(component
  {imports}
  (type $error (variant
    (case "malformed-answer" string) (case "llm" string) (case "invalid-input" string) (case "other" string)))
  (import "agent-error" (type $agent-error (eq $error)))
  (core module $libc
    (memory (export "memory") {memory})
    (data (i32.const 1024) "\"fine\"")
    ;; The result: no error, the text at 1024, 6 bytes.
    (data (i32.const 512) "\00\00\00\00\00\04\00\00\06\00\00\00")
    (func (export "realloc") (param $old i32) (param $bytes i32) (param $align i32) (param $size i32) (result i32)
      {realloc}))
  (core instance $libc (instantiate $libc))
  {lowered}
  (core module $main
    (import "libc" "memory" (memory 1))
    {fields}
    (func (export "run") (param $text i32) (param $length i32) (result i32)
      {run}))
  (core instance $main (instantiate $main
    (with "libc" (instance $libc))
    (with "host" (instance {handed}))))
  (func (export "run") (param "input" string) (result (result string (error $agent-error)))
    (canon lift (core func $main "run") (memory $libc "memory") (realloc (func $libc "realloc")) {options})))"#
        )
    }
}

/// The import of prompt templates, and `$template` lowered.
pub(crate) const TEMPLATES: &str = r#"
  (import "fulgurite:agent/resources@0.1.0" (instance $resources
    (type $error (variant (case "unknown-template" string) (case "invalid-variables" string) (case "other" string)))
    (export "resource-error" (type $resource-error (eq $error)))
    (export "template" (func (param "name" string) (result (result string (error $resource-error)))))))"#;
pub(crate) const LOWER_TEMPLATE: &str = r#"
  (core func $template (canon lower (func $resources "template")
    (memory $libc "memory") (realloc (func $libc "realloc"))))"#;

/// The import of random bytes, and `$random` lowered.
pub(crate) const RANDOM: &str = r#"
  (import "wasi:random/random@0.2.6" (instance $random
    (export "get-random-bytes" (func (param "len" u64) (result (list u8))))))"#;
pub(crate) const LOWER_RANDOM: &str = r#"
  (core func $bytes (canon lower (func $random "get-random-bytes")
    (memory $libc "memory") (realloc (func $libc "realloc"))))"#;

/// The import of standard output, and `$stdout` and `$zeroes` lowered.
pub(crate) const STDOUT: &str = r#"
  (import "wasi:io/error@0.2.6" (instance $errors (export "error" (type (sub resource)))))
  (alias export $errors "error" (type $io-error))
  (import "wasi:io/streams@0.2.6" (instance $streams
    (export "output-stream" (type $stream (sub resource)))
    (alias outer 1 $io-error (type $outer))
    (export "error" (type $error (eq $outer)))
    (type $error' (variant (case "last-operation-failed" (own $error)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $error')))
    (export "[method]output-stream.write-zeroes" (func (param "self" (borrow $stream)) (param "len" u64)
      (result (result (error $stream-error)))))))
  (alias export $streams "output-stream" (type $output))
  (import "wasi:cli/stdout@0.2.6" (instance $standard
    (alias outer 1 $output (type $outer))
    (export "output-stream" (type $stream (eq $outer)))
    (export "get-stdout" (func (result (own $stream))))))"#;
pub(crate) const LOWER_STDOUT: &str = r#"
  (core func $stdout (canon lower (func $standard "get-stdout")))
  (core func $zeroes (canon lower (func $streams "[method]output-stream.write-zeroes") (memory $libc "memory")))"#;

/// So many more instances of a module without anything in it.
pub(crate) fn instances(count: usize) -> String {
    format!("(core module $empty) {}", "(core instance (instantiate $empty))".repeat(count))
}

/// A grader written by hand: `grade` is the body of the function that returns the place of the result.
pub(crate) fn grader(imports: &str, grade: &str) -> String {
    format!(
        r#"(component
  {imports}
  (import "fulgurite:grader/types@0.1.0" (instance $types
    (type $role' (enum "system" "user" "assistant" "tool"))
    (export "role" (type $role (eq $role')))
    (type $tool-call' (record (field "id" string) (field "name" string) (field "arguments" string)))
    (export "tool-call" (type $tool-call (eq $tool-call')))
    (type $value' (variant (case "text" string) (case "integer" s64) (case "number" f64) (case "boolean" bool)))
    (export "attribute-value" (type $value (eq $value')))
    (type $attribute' (record (field "name" string) (field "value" $value)))
    (export "attribute" (type $attribute (eq $attribute')))
    (type $outcome' (record (field "kind" string) (field "output" string) (field "detail" string)))
    (export "outcome" (type $outcome (eq $outcome')))
    (type $tool-event' (record
      (field "name" string) (field "arguments" string) (field "answer" (result string (error string)))))
    (export "tool-event" (type $tool-event (eq $tool-event')))
    (type $llm-event' (record
      (field "index" u64) (field "agent-role" string) (field "prompt" (list (tuple $role string)))
      (field "text" string) (field "tool-calls" (list $tool-call)) (field "completion-tokens" u32)))
    (export "llm-event" (type $llm-event (eq $llm-event')))
    (type $event' (variant (case "llm" $llm-event) (case "tool" $tool-event) (case "object" (tuple string string))))
    (export "event" (type $event (eq $event')))
    (type $case' (record
      (field "input" string) (field "world" string) (field "reference" string) (field "outcome" $outcome)
      (field "trajectory" (list $event)) (field "attributes" (list $attribute))))
    (export "grade-case" (type $case (eq $case')))
    (type $reward' (record
      (field "dimension" string) (field "value" f64) (field "feedback" (option string))
      (field "llm-call" (option u64))))
    (export "reward" (type $reward (eq $reward')))
    (type $error' (variant (case "invalid-item" string) (case "other" string)))
    (export "grader-error" (type (eq $error')))))
  (alias export $types "grade-case" (type $case))
  (alias export $types "reward" (type $reward))
  (alias export $types "grader-error" (type $error))
  (core module $main
    (memory (export "memory") 40)
    (global $next (mut i32) (i32.const 65536))
    (func (export "realloc") (param i32 i32 i32) (param $size i32) (result i32)
      (global.set $next (i32.and (i32.add (global.get $next) (i32.const 15)) (i32.const -16)))
      global.get $next
      (global.set $next (i32.add (global.get $next) (local.get $size))))
    ;; A case has sixteen parts when it is taken apart: as many as are handed over one by one.
    (func (export "grade") (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      {grade}))
  (core instance $main (instantiate $main))
  (func (export "grade") (param "rollout" $case) (result (result (list $reward) (error $error)))
    (canon lift (core func $main "grade") (memory $main "memory") (realloc (func $main "realloc")))))"#
    )
}
