(component
  (core module $main (func (export "grade") (result i32) i32.const 7))
  (core instance $main (instantiate $main))
  (func (export "grade") (result u32) (canon lift (core func $main "grade"))))
