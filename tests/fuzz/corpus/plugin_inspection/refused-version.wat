(component
  (import "fulgurite:agent/task@0.9.0" (instance $task (export "seed" (func (result u64)))))
  (type $resource (resource (rep i32)))
  (component $inner
    (type $record (record (field "a" (list (option (tuple u8 string))))))
    (export "type" (type $record)))
  (instance $inner (instantiate $inner))
  (core module $main (func (export "run") (result i32) i32.const 7))
  (core instance $main (instantiate $main))
  (func (export "run") (result u32) (canon lift (core func $main "run"))))
