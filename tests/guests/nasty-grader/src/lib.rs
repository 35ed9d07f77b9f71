//! nasty-grader
