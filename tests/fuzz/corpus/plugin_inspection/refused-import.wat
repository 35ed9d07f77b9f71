(component
  (import "wasi:http/outgoing-handler@0.2.6" (instance (export "handle" (func))))
  (core module $main (func (export "run") (result i32) i32.const 7))
  (core instance $main (instantiate $main))
  (func (export "run") (result u32) (canon lift (core func $main "run"))))
