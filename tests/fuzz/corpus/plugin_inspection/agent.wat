(component
  (type $error (variant
    (case "malformed-answer" string) (case "llm" string) (case "invalid-input" string) (case "other" string)))
  (import "agent-error" (type $agent-error (eq $error)))
  (import "fulgurite:agent/task@0.1.0" (instance $task (export "seed" (func (result u64)))))
  (core module $main
    (import "host" "seed" (func $seed (result i64)))
    (memory (export "memory") 1)
    (table 2 funcref)
    (data (i32.const 512) "\00\00\00\00\00\04\00\00\06\00\00\00")
    (data (i32.const 1024) "\"fine\"")
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) i32.const 4096)
    (func (export "run") (param i32 i32) (result i32) (drop (call $seed)) i32.const 512))
  (core func $seed (canon lower (func $task "seed")))
  (core instance $main (instantiate $main (with "host" (instance (export "seed" (func $seed))))))
  (func (export "run") (param "input" string) (result (result string (error $agent-error)))
    (canon lift (core func $main "run") (memory $main "memory") (realloc (func $main "realloc")))))
