//! The list of what a test guest can do. A guest's enum and its list of all come from one place, and a test matches on the
//! enum: a behaviour that nobody tests does not compile.

/// Declares the behaviours of a guest. Items name them in kebab-case.
macro_rules! behaviours {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $behaviour:ident,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name {
            $($(#[$doc])* $behaviour,)*
        }

        impl $name {
            /// Every behaviour, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$behaviour),*];
        }
    };
}
