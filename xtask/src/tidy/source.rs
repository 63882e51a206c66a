//! Rust source, with code and comments apart, and its functions and structs.
//!
//! proc-macro2 finds the tokens: what it names is code, what lies between is comments and blanks. So strings and
//! comments hold no words of code, and what macros hide is seen. syn finds the items.

use std::ops::Range;

use proc_macro2::{Span, TokenStream, TokenTree};
use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};

/// One file.
pub struct Source {
    /// The code; comments and literals are blanks, lines and columns stay.
    pub code: String,
    /// The comments; everything else is blank.
    pub comments: String,
    /// Functions that have a body, nested ones too, in the order of the file. None if the file is not Rust.
    pub functions: Option<Vec<Function>>,
    /// Structs with named fields: name, line and number of fields.
    pub structs: Vec<(String, usize, usize)>,
    lines: Vec<usize>,
    tests: Vec<Range<usize>>,
}

/// A function with its body.
pub struct Function {
    /// Its name.
    pub name: String,
    /// First and last line, from 1.
    pub lines: (usize, usize),
    /// Number of arguments, `self` among them.
    pub arguments: usize,
}

/// Items as syn meets them.
#[derive(Default)]
struct Items {
    functions: Vec<Function>,
    structs: Vec<(String, usize, usize)>,
    tests: Vec<Range<usize>>,
}

impl Source {
    /// Takes `text` apart.
    pub fn new(text: &str) -> Self {
        let mut code = Code { text, bytes: blank(text) };
        // What is no Rust has no code. The files of the repository are: `functions` tells.
        let tokens: Option<TokenStream> = text.parse().ok();
        code.take(tokens.unwrap_or_default());
        let comments = code.comments();
        let mut items = Items::default();
        let file = syn::parse_file(text);
        if let Ok(file) = &file {
            items.visit_file(file);
        }
        items.functions.sort_by_key(|function| function.lines.0);
        Self {
            code: String::from_utf8_lossy(&code.bytes).into_owned(),
            comments,
            functions: file.is_ok().then_some(items.functions),
            structs: items.structs,
            lines: std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect(),
            tests: items.tests,
        }
    }

    /// Line of a byte, from 1.
    pub fn line(&self, at: usize) -> usize {
        self.lines.partition_point(|start| *start <= at)
    }

    /// Number of lines.
    pub fn line_count(&self) -> usize {
        self.code.lines().count()
    }

    /// Whether the byte lies in an item under `#[cfg(test)]`.
    pub fn is_test(&self, at: usize) -> bool {
        self.tests.iter().any(|range| range.contains(&at))
    }

    /// Every place of `word` in the code that is not part of a longer name.
    pub fn words<'a>(&'a self, word: &'a str) -> impl Iterator<Item = usize> + 'a {
        words(&self.code, word)
    }
}

/// Every place of `word` in `text` that is not part of a longer name.
pub fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let is_name = |byte: &u8| *byte == b'_' || byte.is_ascii_alphanumeric();
    let bytes = text.as_bytes();
    text.match_indices(word).map(|(at, _)| at).filter(move |at| {
        let before = at.checked_sub(1).is_none_or(|at| !is_name(&bytes[at]));
        before && bytes.get(at + word.len()).is_none_or(|byte| !is_name(byte))
    })
}

/// Blanks in place of everything but line ends.
fn blank(text: &str) -> Vec<u8> {
    text.bytes().map(|byte| if byte == b'\n' { b'\n' } else { b' ' }).collect()
}

/// The code of a file, as its tokens fill it in.
struct Code<'a> {
    text: &'a str,
    bytes: Vec<u8>,
}

impl Code<'_> {
    fn take(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Group(group) => {
                    // A documentation comment is an attribute to the compiler; its group and `#` have its place.
                    if !self.is_comment(group.span()) {
                        self.copy(group.span_open());
                        self.take(group.stream());
                        self.copy(group.span_close());
                    }
                }
                // Quotes stay; what they hold is no code.
                TokenTree::Literal(literal) => {
                    let place = literal.span().byte_range();
                    let is_text = self.text[place.clone()].contains(['"', '\'']);
                    if is_text { self.mark(place) } else { self.copy(literal.span()) }
                }
                other if self.is_comment(other.span()) => {}
                other => self.copy(other.span()),
            }
        }
    }

    fn is_comment(&self, span: Span) -> bool {
        self.text[span.byte_range()].starts_with("//") || self.text[span.byte_range()].starts_with("/*")
    }

    fn copy(&mut self, span: Span) {
        let place = span.byte_range();
        self.bytes[place.clone()].copy_from_slice(&self.text.as_bytes()[place]);
    }

    /// A literal's place: its ends show that something is there.
    fn mark(&mut self, place: Range<usize>) {
        for at in [place.start, place.end - 1] {
            self.bytes[at] = b'"';
        }
    }

    /// Comments: everything that is neither code nor inside a literal, whose ends are marked.
    fn comments(&self) -> String {
        let (text, mut bytes) = (self.text.as_bytes(), blank(self.text));
        let mut in_literal = false;
        for (at, code) in self.bytes.iter().enumerate() {
            match code {
                b'"' => in_literal = !in_literal,
                b' ' if !in_literal => bytes[at] = text[at],
                _ => {}
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Items {
    fn function(&mut self, signature: &syn::Signature, block: &syn::Block) {
        self.functions.push(Function {
            name: signature.ident.to_string(),
            lines: (signature.fn_token.span.start().line, block.brace_token.span.close().end().line),
            arguments: signature.inputs.len(),
        });
    }
}

impl<'a> Visit<'a> for Items {
    fn visit_item(&mut self, item: &'a syn::Item) {
        let attributes = match item {
            syn::Item::Mod(item) => &item.attrs,
            syn::Item::Fn(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            _ => &Vec::new(),
        };
        let is_test = |attribute: &syn::Attribute| {
            attribute.path().is_ident("cfg")
                && attribute.parse_args::<syn::Ident>().is_ok_and(|argument| argument == "test")
        };
        if attributes.iter().any(is_test) {
            self.tests.push(item.span().byte_range());
        }
        visit::visit_item(self, item);
    }

    fn visit_item_fn(&mut self, item: &'a syn::ItemFn) {
        self.function(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'a syn::ImplItemFn) {
        self.function(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'a syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.function(&item.sig, block);
        }
        visit::visit_trait_item_fn(self, item);
    }

    fn visit_item_struct(&mut self, item: &'a syn::ItemStruct) {
        let (line, fields) = (item.ident.span().start().line, item.fields.len());
        self.structs.push((item.ident.to_string(), line, fields));
        visit::visit_item_struct(self, item);
    }
}
